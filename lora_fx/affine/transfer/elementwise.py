"""Transfer functions of add, sub, mul, div and neg: sums of maps, and maps with constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lora_fx.affine.affine_map import AffineMap, Link, common_ancestor
from lora_fx.affine.analysis import Analysis, Opaque, Splat, Value, dtype_of, result_dtype
from lora_fx.algebra.matrix_expr import Matrix, Quotient, Sum, number, repeated, signed, total
from lora_fx.errors import shorten
from lora_fx.graph.ops import call_argument, same_sizes, sizes_of


def add(analysis: Analysis, node: fx.Node) -> Value:
    """A sum of two maps with one source, or of a map and a constant."""
    left, right = call_argument(node, 0, "input"), call_argument(node, 1, "other")
    return _sum(analysis, node, left, right, 1)


def sub(analysis: Analysis, node: fx.Node) -> Value:
    """A difference, likewise."""
    left, right = call_argument(node, 0, "input"), call_argument(node, 1, "other")
    return _sum(analysis, node, left, right, -1)


def rsub(analysis: Analysis, node: fx.Node) -> Value:
    """The second operand minus the first."""
    left, right = call_argument(node, 0, "input"), call_argument(node, 1, "other")
    if call_argument(node, 2, "alpha", 1) != 1:
        return Opaque("a difference with a factor")
    return _sum(analysis, node, right, left, -1)


def mul(analysis: Analysis, node: fx.Node) -> Value:
    """A map scaled by a number, or by a constant vector of the features."""
    left, right = call_argument(node, 0, "input"), call_argument(node, 1, "other")
    x, factor = (right, left) if _is_constant(analysis, left) else (left, right)
    return _scaled(analysis, node, x, factor)


def div(analysis: Analysis, node: fx.Node) -> Value:
    """A map divided likewise."""
    if call_argument(node, 2, "rounding_mode") is not None:
        return Opaque("a division that rounds")
    left, right = call_argument(node, 0, "input"), call_argument(node, 1, "other")
    return _scaled(analysis, node, left, right, inverse=True)


def neg(analysis: Analysis, node: fx.Node) -> Value:
    """A map negated."""
    return _scaled(analysis, node, node.args[0], -1)


def join(
    analysis: Analysis, node: fx.Node, one: AffineMap, other: AffineMap, sign: float = 1
) -> Value:
    """``one + sign * other``, a function of the nearest node that both are functions of."""
    source = common_ancestor(one, other)
    if source is None:
        return Opaque(_two_sources(analysis, one.source.node, other.source.node))
    if not one.layout.same(other.layout):
        return Opaque("a sum that broadcasts, or of tensors laid out differently")
    (weight, bias), (weight_2, bias_2) = one.relative_to(source), other.relative_to(source)
    dtype = result_dtype(node, promoted(one.dtype, other.dtype))
    bias = total(bias, bias_2 and signed(bias_2, sign))
    summed = Sum(weight, signed(weight_2, sign))
    return source.then(node, summed, bias, one.layout, dtype, Link.JOIN)


def _two_sources(analysis: Analysis, *nodes: fx.Node) -> str:
    """Why a sum is no map, with the reasons why what it is of is none."""
    if len(set(nodes)) == 1:
        return f"a sum of maps that read {nodes[0].name} in two ways"
    reasons = [
        f"{node.name}: {value.reason}"
        for node in nodes
        if isinstance(value := analysis.values.get(node), Opaque)
    ]
    return f"a sum of maps of two sources{f' ({shorten(reasons)})' if reasons else ''}"


def _sum(analysis: Analysis, node: fx.Node, left: Any, right: Any, sign: int) -> Value:
    alpha = call_argument(node, 2, "alpha", 1)
    if not isinstance(alpha, int | float) or set(node.kwargs) - {"input", "other", "alpha"}:
        return Opaque("a sum with a factor that is no number")
    factor = float(sign * alpha)
    one, other = _operand(analysis, left, right), _operand(analysis, right, left)
    if one is not None and other is not None:
        return join(analysis, node, one, other, factor)
    if one is not None and (found := _vector(analysis, right, one)):
        return one.shifted(node, signed(found[0], factor), result_dtype(node, found[1]))
    if other is not None and (found := _vector(analysis, left, other)):
        negated = other.scaled(node, number(factor), other.dtype)
        return negated.shifted(node, found[0], result_dtype(node, found[1]))
    return Opaque("a sum with something that is neither a map of one source nor a constant")


def _operand(analysis: Analysis, value: object, beside: object) -> AffineMap | None:
    """The AffineMap of an operand; what has none is a source if it stands beside an AffineMap."""
    found = analysis.map_of(value)
    other = analysis.map_of(beside)
    if found is not None or other is None or not isinstance(value, fx.Node):
        return found
    layout = other.layout
    if isinstance(analysis.values.get(value), Splat) or len(layout.split) != 1:
        return None
    return analysis.source(value, layout.split[0], layout.after)


def _scaled(
    analysis: Analysis, node: fx.Node, x: object, factor: object, inverse: bool = False
) -> Value:
    value = analysis.map_of(x) or _beside_constant(analysis, x, factor)
    found = None if value is None else _vector(analysis, factor, value)
    if found is None and not (_is_constant(analysis, x) or _is_constant(analysis, factor)):
        return Opaque("a product of two activations")
    if value is None:
        return Opaque("a product of no map")
    if found is None:
        return Opaque("a product with something that is no constant of the features")
    column, dtype = found
    return value.scaled(node, _reciprocal(column) if inverse else column, result_dtype(node, dtype))


def _beside_constant(analysis: Analysis, x: object, factor: object) -> AffineMap | None:
    """An activation of known sizes as a source, its features where the constant has them."""
    sizes = sizes_of(x) if isinstance(x, fx.Node) else None
    if not sizes or not _is_constant(analysis, factor):
        return None
    shape = analysis.constants.shape(factor) if isinstance(factor, fx.Node) else ()
    after = len(shape or ()) - len(_stripped(shape or ()))
    size = sizes[len(sizes) - 1 - after] if after < len(sizes) else None
    return analysis.source(x, size, after) if type(size) is int else None


def _stripped(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the ones at its end, but for the first axis."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _is_constant(analysis: Analysis, value: object) -> bool:
    if isinstance(value, int | float):
        return True
    return isinstance(value, fx.Node) and value in analysis.constants.nodes


def _reciprocal(column: Matrix) -> Matrix:
    return Quotient(repeated(1.0, column.shape[0]), column)


def promoted(one: torch.dtype | None, other: torch.dtype | None) -> torch.dtype | None:
    """The dtype that two make, as far as it is known."""
    if one is None or other is None:
        return one or other
    return torch.promote_types(one, other)


def _vector(
    analysis: Analysis, value: object, beside: AffineMap
) -> tuple[Matrix, torch.dtype | None] | None:
    """A constant as a column for the features of an AffineMap, and the dtype that the two make."""
    if isinstance(value, fx.Node) and value in analysis.constants.nodes:
        seen = analysis.constants.on_meta(value)
        value = seen if isinstance(seen, int | float) else value
    if isinstance(value, fx.Node) and isinstance(known := analysis.values.get(value), Splat):
        alike = same_sizes(sizes_of(value), beside.layout.sizes)
        value = known.number if alike and dtype_of(value) == beside.dtype else None
    if isinstance(value, int | float):
        return repeated(float(value), beside.size), beside.dtype
    column = analysis.column(value, beside.layout)
    if column is None or not isinstance(value, fx.Node):
        return None
    alone = not analysis.constants.shape(value)  # has no say in the dtype
    own = None if alone else analysis.constants.dtype(value)
    return column, promoted(beside.dtype, own)
