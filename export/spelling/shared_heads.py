"""Keys and values that several heads of queries share, as each of these reads them."""

from __future__ import annotations

import onnx_ir as ir

from lora_fx.export.spelling.rewrite import number, producer
from lora_fx.export.spelling.sizes import shape_of

_END = 1 << 62  # what is behind any last place


def before_sharing(value: ir.Value) -> ir.Value:
    """What a value repeats, each head for so many heads of queries; else the value itself.

    ``Reshape(Expand(Unsqueeze(x, 2)))`` of (batch, heads, length, size), with slices of everything.
    """
    joined = producer(value, "Reshape")
    spread = producer(joined.inputs[0], "Expand") if joined is not None else None
    apart = producer(_whole(spread.inputs[0]), "Unsqueeze") if spread is not None else None
    if spread is None or apart is None:
        return value
    source = _whole(apart.inputs[0])
    shape, wide, whole = shape_of(source), shape_of(spread.outputs[0]), shape_of(value)
    if source is None or shape is None or wide is None or whole is None or len(wide) != 5:
        return value
    batch, heads, times, *rest = wide
    if not isinstance(heads, int) or not isinstance(times, int) or number(apart.inputs[1]) != 2:
        return value
    is_shared = shape == (batch, heads, *rest) and whole == (batch, heads * times, *rest)
    return source if is_shared else value


def _whole(value: ir.Value | None) -> ir.Value | None:
    """What a value is all of."""
    while (node := producer(value, "Slice")) is not None and _takes_all(node):
        value = node.inputs[0]
    return value


def _takes_all(node: ir.Node) -> bool:
    bounds = [number(given) for given in node.inputs[1:]]
    start, end, _, step = (*bounds, 1, 1)[:4] if len(bounds) < 4 else bounds
    return start == 0 and step == 1 and end is not None and end >= _END
