"""What each operator does to an affine map: one small function an operator."""

from __future__ import annotations

from math import prod

import torch
from torch import fx, nn

from lora_fx.maps import Analysis, Map, Opaque, Rule, Same, Value, meet
from lora_fx.ops import call_argument
from lora_fx.weights import Leaf, Matrix, RowScaled, added, total


def analyse(gm: fx.GraphModule) -> Analysis:
    """Finds the value of every node of a graph in normal form."""
    return Analysis(gm, TRANSFER)


def linear(analysis: Analysis, node: fx.Node) -> Value:
    """``linear(x, W, b)``."""
    weight, bias = call_argument(node, 1, "weight"), call_argument(node, 2, "bias")
    return _layer(analysis, node, node.args[0], weight, bias)


def addmm(analysis: Analysis, node: fx.Node) -> Value:
    """``addmm(b, x, W)`` with W of (in, out)."""
    if len(node.args) != 3:
        return Opaque("addmm with factors")
    bias, x, weight = node.args
    return _layer(analysis, node, x, weight, bias, transposed=True)


def matmul(analysis: Analysis, node: fx.Node) -> Value:
    """``x @ C`` with a constant C of (in, out)."""
    return _layer(analysis, node, node.args[0], node.args[1], None, transposed=True)


def add(analysis: Analysis, node: fx.Node) -> Value:
    """A sum of two maps with one source, or of a map and a constant."""
    return _sum(analysis, node, 1)


def sub(analysis: Analysis, node: fx.Node) -> Value:
    """A difference, likewise."""
    return _sum(analysis, node, -1)


def mul(analysis: Analysis, node: fx.Node) -> Value:
    """A map scaled by a number, or by a constant vector on the feature axis."""
    left, right = node.args
    x, factor = (left, right) if analysis.map_of(left) else (right, left)
    return _scaled(analysis, node, x, factor)


def div(analysis: Analysis, node: fx.Node) -> Value:
    """A map divided likewise."""
    return _scaled(analysis, node, node.args[0], node.args[1], inverse=True)


def neg(analysis: Analysis, node: fx.Node) -> Value:
    """A map negated."""
    return _scaled(analysis, node, node.args[0], -1)


def dropout(analysis: Analysis, node: fx.Node) -> Value:
    """The identity in eval mode."""
    if node.op == "call_module":
        module = analysis.gm.get_submodule(str(node.target))
        live = isinstance(module, nn.Dropout) and module.training and module.p > 0
    else:
        live = call_argument(node, 2, "train", node.kwargs.get("training", True))
    return Opaque("dropout in training") if live else identity(analysis, node)


def identity(analysis: Analysis, node: fx.Node) -> Value:
    """An operator that passes its first input on."""
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return Opaque("of no node")
    value = analysis.values.get(source)
    return value if isinstance(value, Map | Same) else Same(source)


def _layer(
    analysis: Analysis,
    node: fx.Node,
    x: object,
    weight: object,
    bias: object,
    transposed: bool = False,
) -> Value:
    matrix = _matrix(analysis, weight, transposed)
    if matrix is None:
        return Opaque("its weight is no constant matrix")
    column = _column(analysis, bias, matrix.shape[0])
    if bias is not None and column is None:
        return Opaque("its bias is no constant vector")
    source = analysis.source(x, matrix.shape[1])
    if source is None:
        return Opaque("its input is no activation")
    dtype = analysis.constants.dtype(weight)  # type: ignore[arg-type]  # _matrix saw to it
    return source.then(node, dtype, matrix, column)


def _sum(analysis: Analysis, node: fx.Node, sign: int) -> Value:
    left, right = node.args
    one, other = analysis.map_of(left), analysis.map_of(right)
    if one and other:
        return _join(node, one, other, sign)
    if one and one.parent and (shift := _vector(analysis, right, one)):
        return one.shifted(node, _signed(shift, sign))
    if other and other.parent and (shift := _vector(analysis, left, other)):
        return other.scaled(node, _number(sign)).shifted(node, shift)
    return Opaque("a sum with something that is neither a map of one source nor a constant")


def _join(node: fx.Node, one: Map, other: Map, sign: int) -> Value:
    source = meet(one, other)
    if source is None:
        return Opaque("a sum of maps of two sources")
    (weight, bias), (weight_2, bias_2) = one.since(source), other.since(source)
    if weight.shape != weight_2.shape:
        return Opaque("a sum that broadcasts the feature axis")
    dtype = one.dtype or other.dtype
    if dtype is None or (other.dtype or dtype) != dtype:
        return Opaque("a sum of two dtypes, or of an activation with itself")
    bias_2 = bias_2 and _signed(bias_2, sign)
    joined = added(weight, _signed(weight_2, sign))
    return source.then(node, dtype, joined, total(bias, bias_2))


def _scaled(
    analysis: Analysis, node: fx.Node, x: object, factor: object, inverse: bool = False
) -> Value:
    value = analysis.map_of(x)
    if value is None or value.parent is None:
        return Opaque("a product of no map")
    column = _vector(analysis, factor, value)
    if column is None:
        return Opaque("a product with something that is no constant of the feature axis")
    return value.scaled(node, _reciprocal(column) if inverse else column)


def _signed(matrix: Matrix, sign: int) -> Matrix:
    return matrix if sign > 0 else RowScaled(_number(sign), matrix)


def _reciprocal(matrix: Matrix) -> Matrix:
    return Leaf(matrix.shape, lambda: matrix.dense(torch.float64).reciprocal())


def _number(value: float) -> Matrix:
    return Leaf((1, 1), lambda: torch.tensor([[float(value)]]))


def _vector(analysis: Analysis, value: object, beside: Map) -> Matrix | None:
    """What a Map can be multiplied with or added to and stay of its shape and dtype."""
    if isinstance(value, int | float):
        return Leaf((beside.size, 1), lambda: torch.full((beside.size, 1), float(value)))
    column = _column(analysis, value, beside.size)
    if column is None or not isinstance(value, fx.Node):
        return None
    shape, dtype = analysis.constants.shape(value), analysis.constants.dtype(value)
    if not shape:
        return column  # a tensor without axes takes the dtype of what it meets
    seen = beside.node.meta.get("val")
    axes = seen.ndim if isinstance(seen, torch.Tensor) else 1
    kept = beside.dtype in (None, torch.promote_types(dtype, beside.dtype or dtype))
    return column if len(shape) <= axes and kept else None


def _column(analysis: Analysis, value: object, size: int) -> Matrix | None:
    """A constant that is a number or a vector of the feature axis, as a column of ``size``."""
    if not isinstance(value, fx.Node) or value not in analysis.constants.nodes:
        return None
    shape = analysis.constants.shape(value)
    if shape is None or prod(shape) not in (1, size) or shape[-1:] not in ((), (prod(shape),)):
        return None
    return Leaf((size, 1), lambda: analysis.constants.value(value).reshape(-1).expand(size))


def _matrix(analysis: Analysis, node: object, transposed: bool = False) -> Matrix | None:
    if not isinstance(node, fx.Node) or node not in analysis.constants.nodes:
        return None
    shape = analysis.constants.shape(node)
    if shape is None or len(shape) != 2:
        return None
    if transposed:
        return Leaf((shape[1], shape[0]), lambda: analysis.constants.value(node).T)
    return Leaf((shape[0], shape[1]), lambda: analysis.constants.value(node))


TRANSFER: dict[str, Rule] = {
    "linear": linear,
    "addmm": addmm,
    "matmul": matmul,
    "mm": matmul,
    "add": add,
    "sub": sub,
    "mul": mul,
    "div": div,
    "truediv": div,
    "neg": neg,
    "dropout": dropout,
    "identity": identity,
    "alias": identity,
    "clone": identity,
    "contiguous": identity,
    "detach": identity,
}
