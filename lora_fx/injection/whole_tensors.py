"""Whole tensors of a model, exchanged for others: what an adapter replaces, and gives back."""

from __future__ import annotations

import torch
from torch import nn

from lora_fx.graph.editor import Editor
from lora_fx.graph.lazy_tensor import LazyTensor
from lora_fx.layers.parameter_readers import readers


def exchange(editor: Editor, name: str, value: torch.Tensor | LazyTensor) -> set[str]:
    """Makes all that reads a parameter or buffer read another tensor.

    Args:
        editor: of the graph.
        name: by the path of the module that reads it.
        value: of the same shape and dtype.

    Returns:
        The names of what they read until now; none where the graph calls the module whole.
    """
    found = list(readers(editor.gm, name))
    if not found:
        editor.hold(name, value)
        return set()
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    node = editor.constant(name, value, before=found[0][0])
    for reader, source in found:
        editor.rebind(reader, source, node)
    return {str(source.target) for _, source in found}
