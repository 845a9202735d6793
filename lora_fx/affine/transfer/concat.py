"""Transfer functions of cat, stack and pad: what puts features together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from itertools import accumulate
from math import prod
from typing import Any

from torch import fx

from lora_fx.affine.affine_map import AffineMap, Link, common_ancestor
from lora_fx.affine.analysis import Analysis, Opaque, Splat, TupleValue, Value, result_dtype
from lora_fx.affine.feature_layout import Layout
from lora_fx.affine.transfer.elementwise import promoted
from lora_fx.affine.transfer.overwrites import uniform_at
from lora_fx.affine.transfer.views import movable
from lora_fx.algebra.index_expr import along, slice_of
from lora_fx.algebra.matrix_expr import Identity, Matrix, placed, repeated, total
from lora_fx.graph.ops import call_argument, op_name, sizes_of


def cat(analysis: Analysis, node: fx.Node) -> Value:
    """Features of several maps of one source, and of one number, one behind the other."""
    return _joined(analysis, node, is_stack=False)


def stack(analysis: Analysis, node: fx.Node) -> Value:
    """The same along a new axis among the features."""
    return _joined(analysis, node, is_stack=True)


def _joined(analysis: Analysis, node: fx.Node, is_stack: bool) -> Value:
    dim = call_argument(node, 1, "dim", 0)
    parts = _parts_of(analysis, call_argument(node, 0, "tensors"), dim)
    maps = [value for value, _ in parts if isinstance(value, AffineMap)]
    if not maps:
        return Opaque("a concatenation of no maps")
    first, source = maps[0].layout, _meeting(maps)
    axis = first.gap(dim) if is_stack else first.feature(dim)
    layouts = [_layout(value, first, place) for value, place in parts]
    if is_stack and axis is not None:
        layouts = [layout and layout.widened(axis) for layout in layouts]
    if source is None or axis is None or not _are_alike(layouts, axis):
        return Opaque("a concatenation of something else than features of one source")
    sizes = [layout.split[axis] for layout in layouts if layout]
    layout = (first.widened(axis) if is_stack else first).resized(axis, sum(sizes))
    weight: Matrix | None = None
    bias: Matrix | None = None
    for (value, _), end, size in zip(parts, accumulate(sizes), sizes, strict=True):
        if isinstance(value, AffineMap):
            own, shift = value.relative_to(source)
            index = along(axis, layout.split, slice_of(sum(sizes), slice(end - size, end)))
            weight = total(weight, placed(own, index, prod(layout.split)))
            bias = total(bias, shift and placed(shift, index, prod(layout.split)))
        elif value.number:
            index = along(axis, layout.split, slice_of(sum(sizes), slice(end - size, end)))
            shift = repeated(value.number, index.count)
            bias = total(bias, placed(shift, index, prod(layout.split)))
    assert weight is not None
    dtype = result_dtype(node, reduce(promoted, [value.dtype for value in maps]))
    return source.then(node, weight, bias, layout, dtype, Link.JOIN)


def _parts_of(analysis: Analysis, given: Any, dim: Any) -> list[tuple[Any, fx.Node]]:
    """What is put together, value and node; pieces may be handed on as they came."""
    if isinstance(given, list | tuple):
        return [(_part_of_cat(analysis, value, given, dim), value) for value in given]
    pieces = analysis.values.get(given) if isinstance(given, fx.Node) else None
    return [(value, given) for value in pieces.values] if isinstance(pieces, TupleValue) else []


def _are_alike(layouts: list[Layout | None], axis: int) -> bool:
    """Whether all parts are known, and alike but for their sizes along the axis."""
    plain = [layout.resized(axis, 1) for layout in layouts if layout]
    return len(plain) == len(layouts) and all(layout.same(plain[0]) for layout in plain)


def _part_of_cat(analysis: Analysis, node: fx.Node, beside: Sequence[fx.Node], dim: Any) -> Any:
    """The value of a part; what has none is a source beside a function of it, or beside numbers."""
    known = analysis.whole_map_of(node) or uniform_at(analysis, node)
    others = [uniform_at(analysis, other) for other in beside if other is not node]
    sizes = sizes_of(node)
    if others and all(isinstance(other, Splat) for other in others) and sizes and dim == -1:
        size = sizes[-1]  # features at the end, as of any other layer's input
        is_known = isinstance(known, AffineMap | Splat) or type(size) is not int
        return known if is_known else analysis.source(node, size)
    maps = (analysis.whole_map_of(other) for other in beside)
    sources = (other.source for other in maps if other is not None)
    return next((one for one in sources if one.node is node and one.reading is None), known)


def _meeting(maps: list[AffineMap]) -> AffineMap | None:
    nearest: AffineMap | None = maps[0]
    for value in maps[1:]:
        nearest = nearest and common_ancestor(nearest, value)
    return nearest


def _layout(value: Any, first: Layout, node: fx.Node) -> Layout | None:
    """Where a part has its features, if it is a map or one number."""
    if not isinstance(value, AffineMap | Splat):
        return None
    sizes = sizes_of(node)
    if value.layout is not None or sizes is None:
        return value.layout
    end = len(sizes) - first.after
    start = end - len(first.split)
    if start < 0 or not all(type(size) is int for size in sizes[start:end]):
        return None
    batch = (*sizes[:start], *sizes[end:])
    return replace(first, split=tuple(sizes[start:end]), batch=batch, joined=False)


def pad(analysis: Analysis, node: fx.Node) -> Value:
    """Zeros in front of the features and behind them."""
    value, widths = movable(analysis, node.args[0]), call_argument(node, 1, "pad")
    mode, fill = call_argument(node, 2, "mode", "constant"), call_argument(node, 3, "value", 0)
    if op_name(node) == "constant_pad_nd":
        mode, fill = "constant", call_argument(node, 2, "value", 0)
    plain = isinstance(widths, Sequence) and all(isinstance(w, int) and w >= 0 for w in widths)
    if value is None or value.grouped or not plain or mode != "constant" or fill not in (None, 0):
        return Opaque("a padding of no map, or with something else than zeros")
    at = 2 * value.layout.after
    widths = [*widths, *[0] * (at + 2 - len(widths))]
    if any(widths[:at]) or any(widths[at + 2 :]) or len(value.layout.split) != 1:
        return Opaque("a padding of something else than the features")
    size = widths[at] + value.size + widths[at + 1]
    index = slice_of(size, slice(widths[at], widths[at] + value.size))
    weight = placed(Identity(value.size), index, size)
    layout = value.layout.resized(0, size)
    return value.then(node, weight, None, layout, value.dtype, Link.PRODUCT)
