"""Transfer functions of view, permute, casts and dropout: features moved, not changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from lora_fx.affine.affine_map import AffineMap
from lora_fx.affine.analysis import (
    Alias,
    Analysis,
    Opaque,
    Splat,
    Value,
    dtype_of,
)
from lora_fx.affine.feature_layout import Layout
from lora_fx.algebra.index_expr import reordered
from lora_fx.graph.ops import NAMED_CASTS, call_argument, op_name, sizes_of


def identity(analysis: Analysis, node: fx.Node) -> Value:
    """An operator that passes its first input on."""
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return Opaque("of no node")
    value = analysis.values.get(source)
    if isinstance(value, AffineMap):
        return value.moved(node, value.layout, value.dtype)
    return value if isinstance(value, Alias | Splat) else Alias(source)


def dropout(analysis: Analysis, node: fx.Node) -> Value:
    """The identity in eval mode."""
    if node.op == "call_module":
        module = analysis.gm.get_submodule(str(node.target))
        live = isinstance(module, nn.Dropout) and module.training and module.p > 0
    else:
        live = call_argument(node, 2, "train", node.kwargs.get("training", True))
    return Opaque("dropout in training") if live else identity(analysis, node)


def cast(analysis: Analysis, node: fx.Node) -> Value:
    """A change of dtype among floating ones: it rounds, and scales nothing."""
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return Opaque("of no node")
    dtype, before = dtype_of(node) or _asked(analysis, node), dtype_of(source)
    if dtype is None and op_name(node) == "type_as" and (like := analysis.map_of(node.args[1])):
        dtype = like.dtype
    if dtype is None and any(n not in analysis.constants.nodes for n in node.all_input_nodes[1:]):
        return Opaque("a cast to the dtype of another activation")
    if dtype is not None and not dtype.is_floating_point and dtype != before:
        return Opaque("a cast to integers")
    if before is not None and not before.is_floating_point and dtype != before:
        return Opaque("a cast from integers")
    value = analysis.values.get(source)
    if isinstance(value, AffineMap):
        return value.moved(node, value.layout, dtype or value.dtype)
    return identity(analysis, node)


def reshape(analysis: Analysis, node: fx.Node) -> Value:
    """A reshape that keeps the features together."""
    source, sizes = node.args[0], sizes_of(node)
    if any(isinstance(argument, torch.dtype) for argument in (*node.args, *node.kwargs.values())):
        return Opaque("bits read as another dtype")
    if isinstance(source, fx.Node) and isinstance(analysis.values.get(source), Splat):
        return analysis.values[source]
    value = movable(analysis, source)
    layout = value.layout.reshaped(sizes) if value and sizes is not None else None
    if value is None or layout is None:
        return Opaque("a reshape that takes the features apart, or of unknown sizes")
    return value.moved(node, layout, value.dtype)


def transpose(analysis: Analysis, node: fx.Node) -> Value:
    """Two axes swapped."""
    value = movable(analysis, node.args[0])
    one, two = call_argument(node, 1, "dim0"), call_argument(node, 2, "dim1")
    return _permuted(node, value, value.layout.swapped(one, two) if value else None)


def turn(analysis: Analysis, node: fx.Node) -> Value:
    """``x.mT``: the last two axes swapped."""
    value = movable(analysis, node.args[0])
    return _permuted(node, value, value.layout.swapped(-1, -2) if value else None)


def permute(analysis: Analysis, node: fx.Node) -> Value:
    """All axes in a new order."""
    value = movable(analysis, node.args[0])
    dims: Any = node.args[1:]
    order = dims[0] if len(dims) == 1 and isinstance(dims[0], Sequence) else dims
    if not all(isinstance(axis, int) for axis in order) or value is None:
        return Opaque("a permutation of no map")
    return _permuted(node, value, value.layout.permuted([axis % len(order) for axis in order]))


def _permuted(
    node: fx.Node, value: AffineMap | None, found: tuple[Layout, tuple[int, ...]] | None
) -> Value:
    if value is None or found is None:
        return Opaque("a permutation that takes features apart, or of unknown axes")
    layout, order = found
    if order == tuple(range(len(order))):
        return value.moved(node, layout, value.dtype)
    if value.grouped:
        return Opaque("a permutation of the channels of a grouped kernel")
    index = reordered(value.layout.split, order)
    return value.gather(node, index, layout)


def movable(analysis: Analysis, value: object) -> AffineMap | None:
    """A AffineMap, or an activation of known sizes that keeps its features on the last axis."""
    known = analysis.map_of(value)
    if known is not None or not isinstance(value, fx.Node):
        return known
    if isinstance(same := analysis.values.get(value), Alias):
        return movable(analysis, same.node)
    sizes = sizes_of(value)
    return analysis.source(value, sizes[-1]) if sizes and type(sizes[-1]) is int else None


def _asked(analysis: Analysis, node: fx.Node) -> torch.dtype | None:
    """The dtype that a cast names."""
    if op_name(node) in NAMED_CASTS:
        return NAMED_CASTS[op_name(node)]
    given = [*node.args[1:], node.kwargs.get("dtype")]
    known = [
        analysis.constants.on_meta(value)
        if isinstance(value, fx.Node) and value in analysis.constants.nodes
        else value
        for value in given
    ]
    found = [v.dtype if isinstance(v, torch.Tensor) else v for v in known]
    return next((v for v in found if isinstance(v, torch.dtype)), None)
