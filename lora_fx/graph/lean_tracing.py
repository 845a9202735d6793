"""Spares torch, while it traces, what nobody reads."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx
from torch.fx.experimental import proxy_tensor

from lora_fx.graph.lazy_compile import compiled_when_read

_SELDOM = 200_000, 20, 50  # new objects until they are looked through for circles; 700, 10, 10 else
_NOTES = "_extract_tensor_metadata"


@contextmanager
def lean_tracing() -> Iterator[None]:
    """Compiles no graph that is not run, notes no stack of a node, and seldom looks for garbage.

    Nor is noted in which memory formats a tensor is contiguous, beside the tensor that says so: a
    question of all its sizes, each time. Together more than a tenth of the time of a trace: it
    makes a million objects, and keeps most of them.
    """
    threshold, without_stacks = gc.get_threshold(), fx.config.do_not_emit_stack_traces
    noted = vars(proxy_tensor)[_NOTES]
    gc.set_threshold(*map(max, threshold, _SELDOM))
    fx.config.do_not_emit_stack_traces = True
    setattr(proxy_tensor, _NOTES, lambda *_: None)
    try:
        with compiled_when_read():
            yield
    finally:
        setattr(proxy_tensor, _NOTES, noted)
        fx.config.do_not_emit_stack_traces = without_stacks
        gc.set_threshold(*threshold)
