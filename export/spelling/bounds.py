"""Between which numbers a value lies, whatever the inputs are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from lora_fx.export.spelling.rewrite import producer

_READ_AT_MOST = 1 << 20  # numbers of a constant that are looked at: a mask, and no weight


class Bounds(NamedTuple):
    """The least and the greatest that a value can hold, short of NaN."""

    low: float
    high: float


Read = Callable[[ir.Value | None], Bounds]
ANYTHING = Bounds(-math.inf, math.inf)


def bounds_of(value: ir.Value | None) -> Bounds:
    """The bounds of a value; what its dtype has no room for is infinite, as it is computed."""
    known: dict[ir.Value, Bounds] = {}

    def read(value: ir.Value | None) -> Bounds:
        if value is None:
            return ANYTHING
        if value not in known:
            known[value] = _computed(value, read)
        return known[value]

    return read(value)


def dtype_of(value: ir.Value | None) -> ir.DataType | None:
    """The dtype of a value, from what it is made of where it is not noted."""
    if value is None or value.dtype is not None:
        return None if value is None else value.dtype
    tensor = ir.convenience.get_const_tensor(value)
    node = producer(value, _READ)
    if tensor is not None or node is None:
        return None if tensor is None else tensor.dtype
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    return dtype_of(node.inputs[1 if node.op_type == "Where" else 0])


def _computed(value: ir.Value, read: Read) -> Bounds:
    tensor = None if value.is_graph_input() else ir.convenience.get_const_tensor(value)
    if tensor is not None and 0 < tensor.size <= _READ_AT_MOST:
        array = tensor.numpy()
        return _fitted(Bounds(float(array.min()), float(array.max())), tensor.dtype)
    node = producer(value, _READ)
    return _fitted(_READ[node.op_type](node, read) if node else ANYTHING, dtype_of(value))


def _fitted(bounds: Bounds, dtype: ir.DataType | None) -> Bounds:
    """Whole numbers are finite and wrap round, booleans are 0 or 1; floats overflow."""
    if dtype is None or math.isnan(bounds.low) or math.isnan(bounds.high):
        return ANYTHING
    if dtype is ir.DataType.BOOL:
        return Bounds(0.0, 1.0)
    least, most = float(dtype.min), float(dtype.max)
    if not dtype.is_floating_point():
        return bounds if least <= bounds.low and bounds.high <= most else Bounds(least, most)
    return Bounds(
        bounds.low if bounds.low >= least else -math.inf,
        bounds.high if bounds.high <= most else math.inf,
    )


def _first(node: ir.Node, read: Read) -> Bounds:
    return read(node.inputs[0])


def _either(node: ir.Node, read: Read) -> Bounds:
    """Of what picks from several; the condition of a Where is not among them."""
    found = [read(value) for value in node.inputs[node.op_type == "Where" :]]
    return Bounds(min(b.low for b in found), max(b.high for b in found))


def _or_zero(node: ir.Node, read: Read) -> Bounds:
    low, high = read(node.inputs[0])
    return Bounds(min(low, 0.0), max(high, 0.0))


def _arithmetic(node: ir.Node, read: Read) -> Bounds:
    """What is monotonous in both is extreme where both are."""
    operator = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply}[node.op_type]
    one, other = (read(value) for value in node.inputs)
    with np.errstate(all="ignore"):
        found = operator.outer(one, other)
    return Bounds(float(found.min()), float(found.max()))


_MOVES = (
    "Cast", "Expand", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "Slice",
    "Squeeze", "Tile", "Transpose", "Unsqueeze",
)  # fmt: skip
_READ: dict[str, Callable[[ir.Node, Read], Bounds]] = {
    **dict.fromkeys(_MOVES, _first),
    **dict.fromkeys(("Where", "Concat", "Max", "Min"), _either),
    **dict.fromkeys(("Add", "Sub", "Mul"), _arithmetic),
    "Trilu": _or_zero,
}
