"""The transfer functions of convolutions, transposed ones too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch
from torch import fx

from lora_fx.affine.affine_map import Patches
from lora_fx.affine.analysis import Analysis, Opaque, Rule, Value
from lora_fx.affine.constant_expr import in_rows, leaf
from lora_fx.affine.feature_layout import Layout
from lora_fx.affine.transfer.linear import dense_layer
from lora_fx.algebra.matrix_expr import BlockDiag, Leaf, Matrix, columns_scaled
from lora_fx.graph.ops import call_argument, is_around, op_name, sizes_of
from lora_fx.layers.layer_types import OPERATORS


def conv(analysis: Analysis, node: fx.Node) -> Value:
    """A convolution: a linear layer on patches, or on channels if its kernel has one place."""
    groups = call_argument(node, 6, "groups", 1)
    shape = _kernel_shape(analysis, node)
    if shape is None:
        return Opaque("its kernel is no constant")
    patches = _patches(node, shape[2:])
    if patches is None:
        return Opaque("a convolution that pads one side more")
    return _layer(analysis, node, shape, replace(patches, groups=groups))


def conv_transpose(analysis: Analysis, node: fx.Node) -> Value:
    """A transposed convolution: a linear layer on what reaches each place of its result."""
    groups = call_argument(node, 6, "groups", 1)
    shape = _kernel_shape(analysis, node, groups)
    if shape is None:
        return Opaque("its kernel is no constant")
    kernel = shape[2:]
    given = (call_argument(node, place, "", default) for place, default in _TRANSPOSED)
    stride, padding, extra, dilation = (_spread(value, len(kernel)) for value in given)
    dilation = tuple(1 if size == 1 else step for step, size in zip(dilation, kernel, strict=True))
    patches = Patches(kernel, stride, padding, dilation, groups, extra)
    if not any(extra) and _reads_points(replace(patches, extra=None)):
        patches = replace(patches, extra=None)  # a convolution of single points, and no other
    return _layer(analysis, node, shape, patches)


# Where stride, padding, output_padding and dilation of a transposed convolution are.
_TRANSPOSED = ((3, 1), (4, 0), (5, 0), (7, 1))


def _layer(analysis: Analysis, node: fx.Node, shape: tuple[int, ...], patches: Patches) -> Value:
    """A convolution whose kernel is of (out, in / groups, *kernel), however it is stored."""
    dims, groups, x = len(shape) - 2, patches.groups, node.args[0]
    kernel, bias = call_argument(node, 1, "weight"), call_argument(node, 2, "bias")
    if _reads_points(patches):
        matrix = _channels(analysis, node, shape, groups)
        return dense_layer(analysis, node, x, kernel, matrix, bias, after=dims)
    rows, columns = shape[0], prod(shape[1:])
    whole = _kernel(analysis, node, (rows, columns), groups)
    gain = _gain(analysis, node, shape[1], dims) if groups == 1 else None
    if gain is not None:
        x, whole = gain[0], columns_scaled(whole, gain[1])
    source = analysis.source(x, columns, dims, patches)
    column = analysis.column(bias, Layout((rows,)))
    if source is None or (column is None and bias is not None):
        return Opaque("its input is no activation, or its bias no constant")
    sizes = sizes_of(node)
    batch = sizes and (*sizes[: len(sizes) - dims - 1], *sizes[len(sizes) - dims :])
    dtype = analysis.constants.dtype(kernel)
    return source.then(node, whole, column, Layout((rows,), dims, batch), dtype)


def _reads_points(patches: Patches) -> bool:
    ones = (1,) * len(patches.kernel)
    return patches == Patches(ones, ones, (0,) * len(ones), ones, patches.groups)


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


def _channels(analysis: Analysis, node: fx.Node, shape: tuple[int, ...], groups: int) -> Matrix:
    whole = _kernel(analysis, node, (shape[0], shape[1]), groups)
    if not isinstance(whole, Leaf) or groups == 1:
        return whole
    blocks = (groups, shape[0] // groups, shape[1])
    return BlockDiag(blocks, ("channels", groups, whole.key), lambda: whole.fetch().reshape(blocks))


def _kernel(analysis: Analysis, node: fx.Node, shape: tuple[int, int], groups: int) -> Matrix:
    """The kernel as a matrix of (out, in / groups * places), as it is summed up if in no groups."""
    kernel, layer = call_argument(node, 1, "weight"), OPERATORS[node.target]
    stored = leaf(analysis.constants, kernel, shape)
    if not layer.transposed:
        return (in_rows(analysis.constants, kernel) if groups == 1 else None) or stored

    def fetch() -> torch.Tensor:
        return layer.canonical("weight", stored.fetch(), groups).reshape(shape)

    return Leaf(shape, ("turned", groups, stored.key), fetch)


def _kernel_shape(analysis: Analysis, node: fx.Node, groups: int = 1) -> tuple[int, ...] | None:
    """(out, in / groups, *kernel) of a kernel that is constant."""
    kernel = call_argument(node, 1, "weight")
    known = isinstance(kernel, fx.Node) and kernel in analysis.constants.nodes
    shape = analysis.constants.shape(kernel) if known else None
    return shape and OPERATORS[node.target].canonical_shape(shape, groups)


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


RULES: dict[str, Rule] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), conv_transpose),
}
