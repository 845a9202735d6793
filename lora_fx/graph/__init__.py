"""torch.fx plumbing: operators, memory, copies, lazy tensors, editor, passes; no adapters."""
