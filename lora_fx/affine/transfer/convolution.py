"""The transfer function of convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import fx

from lora_fx.affine.affine_map import Patches
from lora_fx.affine.analysis import Analysis, Opaque, Value
from lora_fx.affine.constant_expr import leaf
from lora_fx.affine.feature_layout import Layout
from lora_fx.affine.transfer.linear import dense_layer
from lora_fx.algebra.evaluate import dense
from lora_fx.algebra.matrix_expr import Blocks, Leaf, Matrix, scaled, transposed
from lora_fx.graph.ops import call_argument, is_around, op_name
from lora_fx.graph.sizes import sizes_of


def conv(analysis: Analysis, node: fx.Node) -> Value:
    """A convolution: a linear layer on patches, or on channels if its kernel has one place."""
    dims = int(op_name(node)[4])
    x, kernel = node.args[0], call_argument(node, 1, "weight")
    groups = call_argument(node, 6, "groups", 1)
    shape = _kernel_shape(analysis, kernel)
    if shape is None:
        return Opaque("its kernel is no constant")
    patches = _patches(node, shape[2:])
    if patches is None:
        return Opaque("a convolution that pads one side more")
    if patches == Patches((1,) * dims, (1,) * dims, (0,) * dims, (1,) * dims):
        matrix = _channels(analysis, kernel, shape, groups)
        return dense_layer(
            analysis, node, x, kernel, matrix, call_argument(node, 2, "bias"), after=dims
        )
    patches = replace(patches, groups=groups)
    rows, columns = shape[0], prod(shape[1:])
    whole: Matrix = leaf(analysis.constants, kernel, (rows, columns))
    gain = _gain(analysis, node, shape[1], dims) if groups == 1 else None
    if gain is not None:
        x, whole = gain[0], transposed(scaled(_each_place(gain[1], columns), transposed(whole)))
    source = analysis.source(x, columns, dims, patches)
    bias = analysis.column(call_argument(node, 2, "bias"), Layout((rows,)))
    if source is None or (bias is None and call_argument(node, 2, "bias") is not None):
        return Opaque("its input is no activation, or its bias no constant")
    sizes = sizes_of(node)
    batch = sizes and (*sizes[: len(sizes) - dims - 1], *sizes[len(sizes) - dims :])
    dtype = analysis.constants.dtype(kernel)
    return source.then(node, whole, bias, Layout((rows,), dims, batch), dtype)


def _gain(
    analysis: Analysis, node: fx.Node, channels: int, dims: int
) -> tuple[fx.Node, Matrix] | None:
    """The y and c, if a convolution reads ``y * c`` by channel: zeros around y stay zeros."""
    x = node.args[0]
    is_product = isinstance(x, fx.Node) and op_name(x) == "mul" and is_around(x, node)
    if not is_product or not isinstance(x, fx.Node) or len(x.args) != 2 or x.kwargs:
        return None
    for y, factor in (x.args, x.args[::-1]):
        column = analysis.column(factor, Layout((channels,), dims))
        if column is not None and isinstance(y, fx.Node) and y not in analysis.constants.nodes:
            return y, column
    return None


def _each_place(column: Matrix, columns: int) -> Matrix:
    """One value a channel as one value a column of the kernel: a channel's places are together."""

    def fetch() -> torch.Tensor:
        return dense(column, torch.float64).repeat_interleave(columns // column.shape[0], 0)

    return Leaf((columns, 1), ("each place", columns, column), fetch)


def _channels(analysis: Analysis, kernel: fx.Node, shape: tuple[int, ...], groups: int) -> Matrix:
    if groups == 1:
        return leaf(analysis.constants, kernel, (shape[0], shape[1]))
    blocks = (groups, shape[0] // groups, shape[1])
    key = ("channels", groups, analysis.constants.key(kernel))
    return Blocks(blocks, key, lambda: analysis.constants.value(kernel).reshape(blocks))


def _kernel_shape(analysis: Analysis, kernel: Any) -> tuple[int, ...] | None:
    known = isinstance(kernel, fx.Node) and kernel in analysis.constants.nodes
    return analysis.constants.shape(kernel) if known else None


def _patches(node: fx.Node, kernel: tuple[int, ...]) -> Patches | None:
    """What the kernel visits. A kernel of one place has no dilation to speak of."""
    dims = len(kernel)
    stride = _spread(call_argument(node, 3, "stride", 1), dims)
    dilation = _spread(call_argument(node, 5, "dilation", 1), dims)
    given = call_argument(node, 4, "padding", 0)
    spans = tuple(step * (size - 1) for step, size in zip(dilation, kernel, strict=True))
    if given == "same" and any(span % 2 for span in spans):
        return None
    named = {"same": tuple(span // 2 for span in spans), "valid": (0,) * dims}
    padding = named[given] if isinstance(given, str) else _spread(given, dims)
    dilation = tuple(1 if size == 1 else step for step, size in zip(dilation, kernel, strict=True))
    return Patches(kernel, stride, padding, dilation)


def _spread(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) * (dims // len(value))
