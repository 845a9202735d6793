"""Transfer functions of what puts features together, and of what overwrites some of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate
from typing import Any

from torch import fx

from lora_fx.affine.algebra import placed, rows, total
from lora_fx.affine.analysis import Analysis, Opaque, Uniform, Value, result_dtype
from lora_fx.affine.features import SLICE, constant_index, is_all
from lora_fx.affine.index import Index, all_but, slice_of
from lora_fx.affine.layout import Layout, Sizes, same_sizes, sizes_of
from lora_fx.affine.maps import Link, Map, meet
from lora_fx.affine.matrices import Identity, Matrix
from lora_fx.affine.sums import promoted
from lora_fx.ops import call_argument, op_name


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


def index_put(analysis: Analysis, node: fx.Node) -> Value:
    """Constant places of the last axis overwritten: ``y[:, mask] = values``."""
    into, indices = node.args[0], call_argument(node, 1, "indices")
    values = call_argument(node, 2, "values")
    sizes = sizes_of(node)
    if call_argument(node, 3, "accumulate", False) or sizes is None or type(sizes[-1]) is not int:
        return Opaque("an assignment that accumulates, or into unknown sizes")
    *front, last = indices if isinstance(indices, list | tuple) else [indices]
    if any(i is not None for i in front) or len(front) + 1 != len(sizes):
        return Opaque("an assignment to something else than whole features")
    index = constant_index(analysis, last, sizes[-1])
    if index is None:
        return Opaque("an assignment to places that are no constant")
    return _overwritten(analysis, node, into, values, index, sizes)


def slice_scatter(analysis: Analysis, node: fx.Node) -> Value:
    """A slice of the last axis overwritten: ``y[..., 2:5] = values``."""
    into, values = node.args[0], call_argument(node, 1, "src")
    dim = call_argument(node, 2, "dim", 0)
    start, stop, step = (call_argument(node, 3 + i, n) for i, n in enumerate(SLICE))
    if is_all(start, stop, step):
        new = analysis.map_of(values)
        return new.moved(node, new.layout, new.dtype) if new else Opaque("all of it overwritten")
    sizes = sizes_of(node)
    if sizes is None or dim not in (-1, len(sizes) - 1) or type(sizes[-1]) is not int:
        return Opaque("an assignment to something else than features")
    index = slice_of(sizes[-1], slice(start, stop, step))
    return _overwritten(analysis, node, into, values, index, sizes)


def uniform(analysis: Analysis, node: fx.Node) -> Value:
    """A tensor of one number, in a shape that may hang on the input."""
    like = analysis.map_of(node.args[0]) if op_name(node).endswith("_like") else None
    return Uniform(1.0 if "ones" in op_name(node) else 0.0, like.layout if like else None)


def _overwritten(
    analysis: Analysis, node: fx.Node, into: Any, values: Any, index: Index, sizes: Any
) -> Value:
    source = analysis.whole_map_of(values)
    under = analysis.values.get(into)
    fits = source is not None and source.layout.after == 0 and len(source.layout.split) == 1
    if source is None or not fits or source.size != index.count:
        return Opaque("an assignment of something else than features")
    if not same_sizes(source.layout.batch, tuple(sizes[:-1])):
        return Opaque("an assignment that broadcasts")
    layout = Layout((sizes[-1],), 0, source.layout.batch)
    dtype = result_dtype(node, source.dtype)
    if isinstance(under, Uniform) and under.number == 0:
        weight = placed(Identity(source.size), index, sizes[-1])
        return source.then(node, weight, None, layout, dtype, Link.PRODUCT)
    kept = analysis.whole_map_of(into)
    root = meet(kept, source) if kept is not None else None
    if kept is None or root is None or not kept.layout.same(layout):
        return Opaque("an assignment into something else than zeros or a map of one source")
    others = all_but(sizes[-1], index)
    (own, shift), (new, new_shift) = kept.since(root), source.since(root)

    def merged(old: Matrix | None, fresh: Matrix | None) -> Matrix | None:
        old = old and placed(rows(old, others), others, sizes[-1])
        return total(old, fresh and placed(fresh, index, sizes[-1]))

    weight_2 = merged(own, new)
    assert weight_2 is not None
    return root.then(node, weight_2, merged(shift, new_shift), layout, dtype, Link.JOIN)
