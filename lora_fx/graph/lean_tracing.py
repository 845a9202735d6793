"""Faster tracing: no graph is compiled, no stack is noted, and garbage is seldom collected."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx

from lora_fx.graph.lazy_compile import compiled_when_read

_SELDOM = 200_000, 20, 50  # new objects until they are looked through for circles; 700, 10, 10 else


@contextmanager
def lean_tracing() -> Iterator[None]:
    """Compiles no graph that is not run, notes no stack of a node, and seldom looks for garbage.

    Together a tenth of the time of a trace: it makes a million objects, and keeps most of them.
    """
    threshold, without_stacks = gc.get_threshold(), fx.config.do_not_emit_stack_traces
    gc.set_threshold(*map(max, threshold, _SELDOM))
    fx.config.do_not_emit_stack_traces = True
    try:
        with compiled_when_read():
            yield
    finally:
        fx.config.do_not_emit_stack_traces = without_stacks
        gc.set_threshold(*threshold)
