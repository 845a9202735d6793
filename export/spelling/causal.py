"""Proves that an attention mask is causal: it hides from a query whatever stands behind it."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from lora_fx.export.spelling.bounds import Bounds, bounds_of
from lora_fx.export.spelling.rewrite import producer
from lora_fx.export.spelling.sizes import shape_of
from lora_fx.export.spelling.whole_masks import counting

HIDDEN = -1e9  # or less: added to a score, it leaves a weight of 0 beside any other
# Operator -> what it says of a key's place and that of a query before it, in this order.
_KEY_FIRST = {"LessOrEqual": False, "Less": False, "Greater": True, "GreaterOrEqual": True}


def hides_what_follows(mask: ir.Value, past: ir.Value) -> bool:
    """Whether a mask is lowest wherever a key stands behind its query, whatever the inputs are.

    Args:
        mask: (batch, heads, queries, past + queries), added to the scores.
        past: keys that came before, (batch, heads, past, size).
    """
    shape, before = shape_of(mask), shape_of(past)
    if mask.producer() is None or shape is None or before is None or len(shape) != 4:
        return False
    known = dict(_comparisons(mask, shape[2:], before[2]))
    return bounds_of(mask, known).high <= HIDDEN


def _comparisons(
    mask: ir.Value, sizes: tuple[int | str, ...], past: int | str
) -> Iterator[tuple[ir.Value, Bounds]]:
    """What comparisons of places say of a key that stands behind its query."""
    graph = mask.producer().graph  # type: ignore[union-attr]
    assert isinstance(graph, ir.Graph)
    for node in graph:
        if producer(node.outputs[0], _KEY_FIRST) is None:
            continue
        says = _KEY_FIRST[node.op_type]
        first, second = node.inputs
        for key, query, answer in ((first, second, says), (second, first, not says)):
            if _axis(key, sizes[1]) == -1 and _axis(query, sizes[0], past) == -2:
                yield node.outputs[0], Bounds(float(answer), float(answer))


def _axis(value: ir.Value | None, size: int | str, start: int | str = 0) -> int | None:
    """The axis, from the last one, along which a value counts."""
    shape = shape_of(value)
    axis = counting(value, size, len(shape), start) if shape is not None else None
    return None if shape is None or axis is None else axis - len(shape)
