"""Keys and values that several heads of queries share, as each of these reads them."""

from __future__ import annotations

import onnx_ir as ir

from lora_fx.export.spelling.rewrite import number, producer
from lora_fx.export.spelling.sizes import shape_of


def before_sharing(value: ir.Value) -> ir.Value:
    """What a value repeats, each head for so many heads of queries; else the value itself.

    ``Reshape(Expand(Unsqueeze(x, 2)))`` of (batch, heads, length, size).
    """
    joined = producer(value, "Reshape")
    spread = producer(joined.inputs[0], "Expand") if joined is not None else None
    apart = producer(spread.inputs[0], "Unsqueeze") if spread is not None else None
    if spread is None or apart is None:
        return value
    source = apart.inputs[0]
    shape, wide, whole = shape_of(source), shape_of(spread.outputs[0]), shape_of(value)
    if source is None or shape is None or wide is None or whole is None or len(wide) != 5:
        return value
    batch, heads, times, *rest = wide
    if not isinstance(heads, int) or not isinstance(times, int) or number(apart.inputs[1]) != 2:
        return value
    is_shared = shape == (batch, heads, *rest) and whole == (batch, heads * times, *rest)
    return source if is_shared else value
