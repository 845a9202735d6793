"""Transfer functions of what takes features apart and puts them together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from lora_fx.affine.algebra import placed, rows, total
from lora_fx.affine.analysis import Analysis, Opaque, Parts, Uniform, Value, result_dtype
from lora_fx.affine.index import Index, all_but, along, slice_of
from lora_fx.affine.layout import Layout, Sizes, same_sizes, sizes_of
from lora_fx.affine.maps import Link, Map, meet
from lora_fx.affine.matrices import Identity, Matrix
from lora_fx.affine.moves import identity
from lora_fx.affine.sums import promoted
from lora_fx.ops import call_argument, op_name

_NO_FEATURES = Opaque("takes apart something else than the features of a map")


def slice_(analysis: Analysis, node: fx.Node) -> Value:
    """A slice of the features; of another axis, only if it takes all of it."""
    dim = call_argument(node, 1, "dim", 0)
    start, stop, step = (call_argument(node, 2 + i, n) for i, n in enumerate(_SLICE))
    if _is_all(start, stop, step):
        return identity(analysis, node)
    return _picked(analysis, node, dim, slice(start, stop, step))


def narrow(analysis: Analysis, node: fx.Node) -> Value:
    """A slice, given by its length."""
    dim, start = call_argument(node, 1, "dim"), call_argument(node, 2, "start")
    length = call_argument(node, 3, "length")
    if not isinstance(start, int) or not isinstance(length, int) or start < 0:
        return _NO_FEATURES
    return _picked(analysis, node, dim, slice(start, start + length))


def select(analysis: Analysis, node: fx.Node) -> Value:
    """One feature, whose axis is gone."""
    value, axis = _feature(analysis, node.args[0], call_argument(node, 1, "dim"))
    place = call_argument(node, 2, "index")
    if value is None or axis is None or not isinstance(place, int):
        return _NO_FEATURES
    place %= value.layout.split[axis]
    layout = value.layout
    index = along(axis, layout.split, slice_of(layout.split[axis], slice(place, place + 1)))
    split = (*layout.split[:axis], *layout.split[axis + 1 :])
    return value.picked(node, index, Layout(split, layout.after, layout.batch))


def index_select(analysis: Analysis, node: fx.Node) -> Value:
    """Features by a constant list of places."""
    value, axis = _feature(analysis, node.args[0], call_argument(node, 1, "dim"))
    places = call_argument(node, 2, "index")
    if value is None or axis is None:
        return _NO_FEATURES
    index = _index(analysis, places, value.layout.split[axis])
    if index is None:
        return Opaque("features that are picked by something else than a constant")
    return _taken(node, value, axis, index)


def split(analysis: Analysis, node: fx.Node) -> Value:
    """Features cut into pieces of given sizes."""
    value, axis = _feature(analysis, node.args[0], call_argument(node, 2, "dim", 0))
    if value is None or axis is None:
        return _NO_FEATURES
    given = [*node.args[1:2], *(node.kwargs[name] for name in _PIECES if name in node.kwargs)]
    lengths = _lengths(op_name(node), given[0], value.layout.split[axis])
    if lengths is None:
        return Opaque("pieces of unknown sizes")
    pieces, start = [], 0
    for length in lengths:
        index = slice_of(value.layout.split[axis], slice(start, start + length))
        pieces.append(_taken(node, value, axis, index))
        start += length
    return Parts(tuple(pieces))


def getitem(analysis: Analysis, node: fx.Node) -> Value:
    """One of several pieces, or Python's own slices of a tensor."""
    source, place = node.args
    value = analysis.values.get(source) if isinstance(source, fx.Node) else None
    if isinstance(value, Parts) and isinstance(place, int):
        return value.values[place].of(node)
    if not isinstance(value, Map) or not isinstance(place, tuple) or value.layout.after:
        return _NO_FEATURES
    *front, last = place
    axes = value.layout.axes
    reaches = Ellipsis in front or (axes is not None and len(place) == axes)
    whole = all(step is Ellipsis or step == slice(None) for step in front)
    if not reaches or not whole or not isinstance(last, slice):
        return _NO_FEATURES
    return _picked(analysis, node, -1, last)


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
    index = _index(analysis, last, sizes[-1])
    if index is None:
        return Opaque("an assignment to places that are no constant")
    return _overwritten(analysis, node, into, values, index, sizes)


def slice_scatter(analysis: Analysis, node: fx.Node) -> Value:
    """A slice of the last axis overwritten: ``y[..., 2:5] = values``."""
    into, values = node.args[0], call_argument(node, 1, "src")
    dim = call_argument(node, 2, "dim", 0)
    start, stop, step = (call_argument(node, 3 + i, n) for i, n in enumerate(_SLICE))
    if _is_all(start, stop, step):
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


def _picked(analysis: Analysis, node: fx.Node, dim: Any, cut: slice) -> Value:
    value, axis = _feature(analysis, node.args[0], dim)
    if value is None or axis is None or not _is_plain(cut):
        return _NO_FEATURES
    return _taken(node, value, axis, slice_of(value.layout.split[axis], cut))


def _taken(node: fx.Node, value: Map, axis: int, index: Index) -> Map:
    """Some places of one feature axis."""
    layout = value.layout.resized(axis, index.count)
    return value.picked(node, along(axis, value.layout.split, index), layout)


def _feature(analysis: Analysis, x: object, dim: object) -> tuple[Map | None, int | None]:
    value = analysis.whole_map_of(x)
    return value, value.layout.feature(dim) if value else None


def _is_plain(cut: slice) -> bool:
    return all(v is None or type(v) is int for v in (cut.start, cut.stop, cut.step))


def _index(analysis: Analysis, node: Any, size: int) -> Index | None:
    """A constant mask or list of places."""
    if isinstance(node, list | tuple) and len(node) == 1:
        node = node[0]
    if not isinstance(node, fx.Node) or node not in analysis.constants.nodes:
        return None
    meta = analysis.constants.on_meta(node)
    if not isinstance(meta, torch.Tensor) or meta.ndim != 1 or meta.is_floating_point():
        return None
    value = analysis.constants.value(node)
    places = value.nonzero().reshape(-1) if value.dtype == torch.bool else value % size
    if len(places.unique()) != len(places):
        return None
    return Index(("places", analysis.constants.key(node)), len(places), places.long)


def _is_all(start: Any, stop: Any, step: Any) -> bool:
    return start in (None, 0) and stop in (None, _ALL) and step in (None, 1)


def _lengths(name: str, given: Any, size: int) -> list[int] | None:
    if isinstance(given, list | tuple):
        return list(given) if all(type(n) is int for n in given) else None
    if type(given) is not int or given < 1:
        return None
    step = -(-size // given) if name == "chunk" else given
    return [min(step, size - start) for start in range(0, size, step)]


_ALL = 9223372036854775807
_PIECES = ("split_size", "split_size_or_sections", "split_sizes", "chunks")
_SLICE = ("start", "end", "step")
