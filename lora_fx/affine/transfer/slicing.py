"""Transfer functions of what takes features apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lora_fx.affine.affine_map import Map
from lora_fx.affine.analysis import Analysis, Opaque, Parts, Value
from lora_fx.affine.feature_layout import Layout
from lora_fx.affine.transfer.views import identity
from lora_fx.algebra.index_expr import Index, along, slice_of
from lora_fx.graph.memory_views import steps_of
from lora_fx.graph.ops import aten, call_argument, op_name

SLICE = ("start", "end", "step")  # how operators call the arguments of a slice
_PIECES = ("split_size", "split_size_or_sections", "split_sizes", "chunks")
_END = 9223372036854775807  # the stop of a slice that has none
_NO_FEATURES = Opaque("takes apart something else than the features of a map")


def slice_(analysis: Analysis, node: fx.Node) -> Value:
    """A slice of the features; of another axis, only if it takes all of it."""
    dim = call_argument(node, 1, "dim", 0)
    start, stop, step = (call_argument(node, 2 + i, n) for i, n in enumerate(SLICE))
    if is_all(start, stop, step):
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
    return _one(analysis, node, call_argument(node, 1, "dim"), call_argument(node, 2, "index"))


def index_select(analysis: Analysis, node: fx.Node) -> Value:
    """Features by a constant list of places."""
    value, axis = _feature(analysis, node.args[0], call_argument(node, 1, "dim"))
    places = call_argument(node, 2, "index")
    if value is None or axis is None:
        return _NO_FEATURES
    index = constant_index(analysis, places, value.layout.split[axis])
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
    if not isinstance(value, Map) or not isinstance(place, tuple):
        return _NO_FEATURES
    steps = steps_of(place)
    if steps is None or len(steps) != 1:
        return _NO_FEATURES
    ((target, (dim, *cut)),) = steps
    if target is aten.select.int:
        return _one(analysis, node, dim, cut[0])
    return _picked(analysis, node, dim, slice(*cut))


def constant_index(analysis: Analysis, node: Any, size: int) -> Index | None:
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


def is_all(start: Any, stop: Any, step: Any) -> bool:
    """Whether a slice takes everything."""
    return start in (None, 0) and stop in (None, _END) and step in (None, 1)


def _picked(analysis: Analysis, node: fx.Node, dim: Any, cut: slice) -> Value:
    value, axis = _feature(analysis, node.args[0], dim)
    if value is None or axis is None or not _is_plain(cut):
        return _NO_FEATURES
    return _taken(node, value, axis, slice_of(value.layout.split[axis], cut))


def _one(analysis: Analysis, node: fx.Node, dim: Any, place: Any) -> Value:
    value, axis = _feature(analysis, node.args[0], dim)
    if value is None or axis is None or not isinstance(place, int):
        return _NO_FEATURES
    place %= value.layout.split[axis]
    layout = value.layout
    index = along(axis, layout.split, slice_of(layout.split[axis], slice(place, place + 1)))
    split = (*layout.split[:axis], *layout.split[axis + 1 :])
    return value.picked(node, index, Layout(split, layout.after, layout.batch))


def _taken(node: fx.Node, value: Map, axis: int, index: Index) -> Map:
    """Some places of one feature axis."""
    layout = value.layout.resized(axis, index.count)
    return value.picked(node, along(axis, value.layout.split, index), layout)


def _feature(analysis: Analysis, x: object, dim: object) -> tuple[Map | None, int | None]:
    value = analysis.whole_map_of(x)
    return value, value.layout.feature(dim) if value else None


def _is_plain(cut: slice) -> bool:
    return all(v is None or type(v) is int for v in (cut.start, cut.stop, cut.step))


def _lengths(name: str, given: Any, size: int) -> list[int] | None:
    if isinstance(given, list | tuple):
        return list(given) if all(type(n) is int for n in given) else None
    if type(given) is not int or given < 1:
        return None
    step = -(-size // given) if name == "chunk" else given
    return [min(step, size - start) for start in range(0, size, step)]
