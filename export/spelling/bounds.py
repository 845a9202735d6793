"""Interval analysis of an ONNX graph: between which numbers a value lies, whatever the inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from lora_fx.export.spelling.rewrite import producer
from lora_fx.export.spelling.sizes import sizes_in

_READ_AT_MOST = 1 << 20  # numbers of a constant that are looked at: a mask, and no weight
_TRUTH = ("And", "Or", "Not", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "IsNaN")


class Bounds(NamedTuple):
    """The least and the greatest that a value can hold, short of NaN."""

    low: float
    high: float


Read = Callable[[ir.Value | None], Bounds]
ANYTHING = Bounds(-math.inf, math.inf)


def bounds_of(value: ir.Value | None, given: Mapping[ir.Value, Bounds] | None = None) -> Bounds:
    """The bounds of a value; what its dtype has no room for is infinite, as it is computed.

    Args:
        value: of a graph.
        given: what is known of others at some places, along their last two axes: the bounds are
            those of these places.
    """
    everywhere = bounds_of if given else None
    known = dict(given or {})

    def read(value: ir.Value | None) -> Bounds:
        if value is None:
            return ANYTHING
        if value not in known:
            known[value] = _computed(value, read, everywhere or read)
        return known[value]

    return read(value)


def dtype_of(value: ir.Value | None) -> ir.DataType | None:
    """The dtype of a value, from what it is made of where it is not noted."""
    if value is None or value.dtype is not None:
        return None if value is None else value.dtype
    tensor = ir.convenience.get_const_tensor(value)
    if producer(value, _TRUTH) is not None:
        return ir.DataType.BOOL
    node = producer(value, _READ)
    if tensor is not None or node is None:
        return None if tensor is None else tensor.dtype
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    return dtype_of(node.inputs[1 if node.op_type == "Where" else 0])


def _computed(value: ir.Value, read: Read, everywhere: Read) -> Bounds:
    tensor = None if value.is_graph_input() else ir.convenience.get_const_tensor(value)
    if tensor is not None and 0 < tensor.size <= _READ_AT_MOST:
        array = tensor.numpy()
        return _fitted(Bounds(float(array.min()), float(array.max())), tensor.dtype)
    node = producer(value, _READ)
    if node is None:
        return _fitted(ANYTHING, dtype_of(value))
    found = _READ[node.op_type](node, read if _keeps_places(node) else everywhere)
    return _fitted(found, dtype_of(value))


def _keeps_places(node: ir.Node) -> bool:
    """Whether the last two axes of a result are those of what it is made of."""
    if node.op_type != "Unsqueeze":
        return node.op_type not in _MOVES
    axes, shape = sizes_in(node.inputs[1]), node.outputs[0].shape
    if axes is None or shape is None:
        return False
    return all(int(axis) % len(shape) < len(shape) - 2 for axis in axes)


def _fitted(bounds: Bounds, dtype: ir.DataType | None) -> Bounds:
    """Whole numbers are finite and wrap round, booleans are 0 or 1; floats overflow."""
    if dtype is None or math.isnan(bounds.low) or math.isnan(bounds.high):
        return ANYTHING
    if dtype is ir.DataType.BOOL:
        return Bounds(float(bounds.low > 0 or bounds.high < 0), float(any(bounds)))
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
    """Of what is one of several."""
    found = [read(value) for value in node.inputs]
    return Bounds(min(b.low for b in found), max(b.high for b in found))


def _chosen(node: ir.Node, read: Read) -> Bounds:
    """Of what a condition chooses, or of both where it is not known."""
    condition, yes, no = node.inputs
    low, high = read(condition)
    kept = [value for value, is_possible in ((yes, high > 0), (no, low < 1)) if is_possible]
    found = [read(value) for value in kept]
    return Bounds(min(b.low for b in found), max(b.high for b in found))


def _and(node: ir.Node, read: Read) -> Bounds:
    one, other = (read(value) for value in node.inputs)
    return Bounds(min(one.low, other.low), min(one.high, other.high))


def _or(node: ir.Node, read: Read) -> Bounds:
    one, other = (read(value) for value in node.inputs)
    return Bounds(max(one.low, other.low), max(one.high, other.high))


def _not(node: ir.Node, read: Read) -> Bounds:
    low, high = read(node.inputs[0])
    return Bounds(1 - high, 1 - low)


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


_MOVES: dict[str, Callable[[ir.Node, Read], Bounds]] = {
    **dict.fromkeys(
        ("Gather", "GatherElements", "GatherND", "Reshape", "Slice", "Squeeze", "Tile"), _first
    ),
    **dict.fromkeys(("Transpose", "Unsqueeze"), _first),
    "Concat": _either,
}
_READ: dict[str, Callable[[ir.Node, Read], Bounds]] = {
    **_MOVES,
    **dict.fromkeys(("Cast", "Expand", "Identity"), _first),
    **dict.fromkeys(("Max", "Min"), _either),
    "Where": _chosen,
    "And": _and,
    "Or": _or,
    "Not": _not,
    **dict.fromkeys(("Add", "Sub", "Mul"), _arithmetic),
    "Trilu": _or_zero,
}
