"""Transfer functions of linear, addmm, matmul and embedding: what has a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from lora_fx.affine.affine_map import AffineMap, Link, OneHot
from lora_fx.affine.analysis import Analysis, Opaque, Value
from lora_fx.affine.constant_expr import turns
from lora_fx.affine.feature_layout import Layout
from lora_fx.affine.transfer.elementwise import join
from lora_fx.algebra.matrix_expr import Matrix, number, transposed
from lora_fx.graph.ops import call_argument, op_name, sizes_of
from lora_fx.layers.matrix_products import has_factors, product_of

_PRODUCTS = {"matmul", "mm", "bmm", "baddbmm", "tensordot"}


def linear(analysis: Analysis, node: fx.Node) -> Value:
    """``linear(x, W, b)``."""
    weight, bias = call_argument(node, 1, "weight"), call_argument(node, 2, "bias")
    return dense_layer(analysis, node, node.args[0], weight, analysis.matrix(weight), bias)


def addmm(analysis: Analysis, node: fx.Node) -> Value:
    """``beta b + alpha x @ W`` with W of (in, out), or ``baddbmm``; b may be a map itself."""
    bias, x, weight = node.args[:3]
    beta, alpha = call_argument(node, 3, "beta", 1), call_argument(node, 4, "alpha", 1)
    if not all(isinstance(factor, int | float) for factor in (beta, alpha)):
        return Opaque("a sum with a factor that is no number")
    weight = _without_batch(analysis, node, weight, x)
    matrix = analysis.matrix(weight)
    turned = matrix and transposed(matrix)
    base = analysis.map_of(bias)
    if base is None and not has_factors(node):
        return dense_layer(analysis, node, x, weight, turned, bias)
    value = dense_layer(analysis, node, x, weight, turned)
    if base is None or not isinstance(value, AffineMap):
        return value if base is not None else Opaque("addmm with factors")
    return join(analysis, node, _times(base, beta), _times(value, alpha))


def _times(value: AffineMap, factor: float) -> AffineMap:
    return value if factor == 1 else value.scaled(value.node, number(factor), value.dtype)


def matmul(analysis: Analysis, node: fx.Node) -> Value:
    """``x @ C`` with a constant C of (in, out), or ``C @ x`` along the axis before the last.

    `tensordot` is the same along any axis.
    """
    if op_name(node) == "tensordot":
        return _tensordot(analysis, node)
    first = call_argument(node, 0, "input")
    second = call_argument(node, 1, "mat2", node.kwargs.get("other"))
    left = _without_batch(analysis, node, first, second)
    right = _without_batch(analysis, node, second, first)
    matrix = analysis.matrix(right)
    if matrix is not None or analysis.matrix(left) is None:
        return dense_layer(analysis, node, left, right, matrix and transposed(matrix))
    axes = _axes(analysis, right)
    is_matrix = len(axes) > 1 if axes is not None else right is not None and turns(right)
    if not is_matrix:
        return Opaque("a product from the left with something of unknown axes")
    return dense_layer(analysis, node, right, left, analysis.matrix(left), after=1)


def _tensordot(analysis: Analysis, node: fx.Node) -> Value:
    """``tensordot(x, C, [-1], [0])`` and its kin: a sum over one axis of a constant matrix."""
    product = product_of(node)
    if product is None:
        return Opaque("a tensordot over several axes, or of unknown ones")
    matrix, labels = analysis.matrix(product.matrix), product.labels
    matrix = matrix if product.turned or matrix is None else transposed(matrix)
    after, behind = (labels.before, labels.behind) if labels else (0, 0)
    value = dense_layer(analysis, node, product.x, product.matrix, matrix, after=after)
    if not isinstance(value, AffineMap):
        return value
    return replace(value, layout=replace(value.layout, after=behind))


def embedding(analysis: Analysis, node: fx.Node) -> Value:
    """A lookup: a linear layer on one-hot ids."""
    table, ids = call_argument(node, 0, "weight"), call_argument(node, 1, "indices")
    matrix = analysis.matrix(table)
    if matrix is None:
        return Opaque("its table is no constant matrix")
    source = analysis.source(ids, matrix.shape[0], reading=OneHot())
    if source is None:
        return Opaque("its ids are no activation")
    layout = replace(source.layout, split=(matrix.shape[1],))
    dtype = analysis.constants.dtype(table)
    return source.then(node, transposed(matrix), None, layout, dtype)


def dense_layer(
    analysis: Analysis,
    node: fx.Node,
    x: object,
    constant: Any,
    matrix: Matrix | None,
    bias: object = None,
    after: int = 0,
) -> Value:
    """A layer of one matrix along the features of ``x``, which are followed by ``after`` axes."""
    if matrix is None:
        return Opaque("its weight is no constant matrix")
    column = analysis.column(bias, Layout((matrix.shape[0],)))
    if bias is not None and column is None:
        return Opaque("its bias is no constant vector")
    source = analysis.source(x, matrix.shape[1], after)
    if source is None:
        return Opaque("its input is no activation")
    layout = replace(source.layout, split=(matrix.shape[0],))
    link = Link.PRODUCT if op_name(node) in _PRODUCTS else Link.LAYER
    return source.then(node, matrix, column, layout, analysis.constants.dtype(constant), link)


def _axes(analysis: Analysis, operand: Any) -> Sequence[Any] | None:
    """The sizes of an operand, as far as they are known."""
    known = analysis.map_of(operand)
    return known.layout.sizes if known else sizes_of(operand)


def _without_batch(analysis: Analysis, node: fx.Node, operand: Any, other: Any) -> Any:
    """An operand, seen through to what it repeats for a batch that the other one has too."""
    is_batched = op_name(node) in ("bmm", "baddbmm")
    while isinstance(operand, fx.Node) and _repeats(analysis, operand):
        if not is_batched and not _is_one_of(analysis, operand, _axes(analysis, other)):
            break
        operand = operand.args[0]
    return operand


def _is_one_of(analysis: Analysis, operand: fx.Node, axes: Sequence[Any] | None) -> bool:
    """Whether ``C[None]`` meets as many axes: one of a batch, which makes none where x has it."""
    if op_name(operand) != "unsqueeze" or operand not in analysis.constants.nodes:
        return False
    shape = analysis.constants.shape(operand)
    return shape is not None and axes is not None and 2 < len(shape) <= len(axes)


def _repeats(analysis: Analysis, node: fx.Node) -> bool:
    """Whether a node gives a constant matrix a batch and leaves its rows and columns alone."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or source not in analysis.constants.nodes:
        return False
    shape = analysis.constants.shape(source)
    if op_name(node) == "unsqueeze":
        return call_argument(node, 1, "dim") in range(max(1, len(shape or ()) - 1))
    rest = node.args[1:]
    sizes = rest[0] if len(rest) == 1 and not isinstance(rest[0], int) else rest
    sizes = sizes or node.kwargs.get("size")
    if op_name(node) == "repeat" and shape is not None and isinstance(sizes, list | tuple):
        return list(sizes[-2:]) == [1, 1]
    if op_name(node) != "expand" or shape is None or not isinstance(sizes, list | tuple):
        return False
    return all(n in (-1, m) for n, m in zip(sizes[-2:], shape[-2:], strict=True))
