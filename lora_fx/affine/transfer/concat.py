"""Transfer functions of what puts features together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate
from typing import Any

from torch import fx

from lora_fx.affine.affine_map import Link, Map, meet
from lora_fx.affine.analysis import Analysis, Opaque, Uniform, Value, result_dtype
from lora_fx.affine.feature_layout import Layout
from lora_fx.affine.transfer.elementwise import promoted
from lora_fx.algebra.index_expr import slice_of
from lora_fx.algebra.matrix_expr import Identity, Matrix, placed, total
from lora_fx.graph.ops import call_argument, op_name
from lora_fx.graph.sizes import Sizes, sizes_of


def cat(analysis: Analysis, node: fx.Node) -> Value:
    """Features of several maps of one source, and zeros, one behind the other."""
    given, dim = call_argument(node, 0, "tensors"), call_argument(node, 1, "dim", 0)
    found = [_part_of_cat(analysis, value, given) for value in given or ()]
    maps = [value for value in found if isinstance(value, Map)]
    if not maps or len(maps[0].layout.split) != 1:
        return Opaque("a concatenation of no maps")
    first = maps[0]
    source, axis = _meeting(maps), first.layout.feature(dim)
    sizes = [_part(value, first, place) for value, place in zip(found, given, strict=True)]
    if source is None or axis is None or None in sizes:
        return Opaque("a concatenation of something else than features of one source")
    known = [size for size in sizes if size is not None]
    weight: Matrix | None = None
    bias: Matrix | None = None
    for start, value in zip(accumulate([0, *known]), found, strict=False):
        if isinstance(value, Map):
            own, shift = value.since(source)
            index = slice_of(sum(known), slice(start, start + value.size))
            weight = total(weight, placed(own, index, sum(known)))
            bias = total(bias, shift and placed(shift, index, sum(known)))
    assert weight is not None
    dtype = result_dtype(node, reduce(promoted, [value.dtype for value in maps]))
    layout = first.layout.resized(0, sum(known))
    return source.then(node, weight, bias, layout, dtype, Link.JOIN)


def _part_of_cat(analysis: Analysis, node: fx.Node, beside: Sequence[fx.Node]) -> Any:
    """The value of a part; what has none is a source if it stands beside a function of it."""
    known = analysis.whole_map_of(node) or analysis.values.get(node)
    maps = (analysis.whole_map_of(other) for other in beside)
    sources = (other.source for other in maps if other is not None)
    return next((one for one in sources if one.node is node and one.reading is None), known)


def _meeting(maps: list[Map]) -> Map | None:
    nearest: Map | None = maps[0]
    for value in maps[1:]:
        nearest = nearest and meet(nearest, value)
    return nearest


def _part(value: Any, first: Map, node: fx.Node) -> int | None:
    """How many features a part of a concatenation has, if it is a map or zeros like the first."""
    layout = value.layout if isinstance(value, Map | Uniform) else None
    if isinstance(value, Uniform):
        sizes = sizes_of(node)
        if value.number != 0 or (layout is None and sizes is None):
            return None
        layout = layout or _last(sizes or ())
    alike = layout is not None and layout.resized(0, 1).same(first.layout.resized(0, 1))
    return layout.split[0] if alike and layout is not None else None


def _last(sizes: Sizes) -> Layout | None:
    is_known = bool(sizes) and type(sizes[-1]) is int
    return Layout((sizes[-1],), 0, tuple(sizes[:-1])) if is_known else None


def pad(analysis: Analysis, node: fx.Node) -> Value:
    """Zeros in front of the features and behind them."""
    value, widths = analysis.whole_map_of(node.args[0]), call_argument(node, 1, "pad")
    mode, fill = call_argument(node, 2, "mode", "constant"), call_argument(node, 3, "value", 0)
    if op_name(node) == "constant_pad_nd":
        mode, fill = "constant", call_argument(node, 2, "value", 0)
    plain = isinstance(widths, Sequence) and all(isinstance(w, int) and w >= 0 for w in widths)
    if value is None or not plain or mode != "constant" or fill not in (None, 0):
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
