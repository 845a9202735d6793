"""Transfer functions of sum and mean over features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from torch import fx

from lora_fx.affine.affine_map import Link
from lora_fx.affine.analysis import Analysis, Opaque, Value, result_dtype
from lora_fx.affine.feature_layout import Layout
from lora_fx.algebra.matrix_expr import (
    Identity,
    Kron,
    Matrix,
    number,
    product,
    repeated,
    scaled,
    transposed,
)
from lora_fx.graph.ops import call_argument, op_name


def summed(analysis: Analysis, node: fx.Node) -> Value:
    """``x.sum(dim)`` and ``x.mean(dim)`` along axes of features."""
    value, dims = analysis.whole_map_of(node.args[0]), call_argument(node, 1, "dim")
    dims = list(dims) if isinstance(dims, Sequence) else [dims]
    axes = [value.layout.feature(dim) for dim in dims] if value else []
    known = sorted({axis for axis in axes if axis is not None}, reverse=True)
    if value is None or not known or len(known) < len(dims):
        return Opaque("a sum over something else than features of a map")
    layout, keeps = value.layout, bool(call_argument(node, 2, "keepdim", False))
    weight: Matrix = Identity(value.size)
    for axis in known:  # the last one first: those in front stay where they are
        weight = product(_ones_along(layout, axis), weight)
        layout = layout.resized(axis, 1)
    if op_name(node) == "mean":
        weight = scaled(number(layout.count / value.layout.count), weight)
    if not keeps:
        split = tuple(size for axis, size in enumerate(layout.split) if axis not in known)
        layout = replace(layout, split=split)
    dtype = call_argument(node, 3, "dtype")
    if dtype is not None and not dtype.is_floating_point:
        return Opaque("a sum in integers")
    return value.then(
        node, weight, None, layout, result_dtype(node, dtype or value.dtype), Link.PRODUCT
    )


def _ones_along(layout: Layout, axis: int) -> Matrix:
    """What adds up the features along one axis: each of the others gets the sum of its own."""
    matrix: Matrix = transposed(repeated(1.0, layout.split[axis]))
    for size, is_left in (
        (prod(layout.split[axis + 1 :]), False),
        (prod(layout.split[:axis]), True),
    ):
        if size > 1:
            matrix = Kron(Identity(size), matrix) if is_left else Kron(matrix, Identity(size))
    return matrix
