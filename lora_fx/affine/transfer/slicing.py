"""Transfer functions of slice, select, index, split, flip and roll: features picked.

Whatever does it, is run on the numbers of the places along the axis, and not listed: what comes out
says which places it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx

from lora_fx.affine.analysis import Analysis, Opaque, TupleValue, Value
from lora_fx.affine.feature_layout import Layout
from lora_fx.affine.transfer.views import identity
from lora_fx.algebra.index_expr import Index, along, listed, then
from lora_fx.graph.memory_views import steps_of
from lora_fx.graph.ops import call_argument, op_name

SLICE = ("start", "end", "step")  # how operators call the arguments of a slice
_END = 9223372036854775807  # the stop of a slice that has none
_NO_FEATURES = Opaque("takes apart something else than the features of a map")
_NOT_FIXED = Opaque("features that are picked twice, or by something else than a constant")

Run = Callable[[torch.Tensor], Any]  # from the numbers of an axis to those that are taken


def slice_(analysis: Analysis, node: fx.Node) -> Value:
    """A slice of the features; of another axis, only if it takes all of it."""
    cut = [call_argument(node, 2 + i, name) for i, name in enumerate(SLICE)]
    return identity(analysis, node) if is_all(*cut) else pick(analysis, node)


def pick(analysis: Analysis, node: fx.Node) -> Value:
    """Features along one axis, or one of them, whose axis is gone."""
    return _taken(analysis, node, [(call_argument(node, 1, "dim", 0), _again(analysis, node, 1))])


def pieces(analysis: Analysis, node: fx.Node) -> Value:
    """Features cut into several pieces."""
    place = 1 if op_name(node) == "unbind" else 2
    value = analysis.whole_map_of(node.args[0])
    axis = value.layout.feature(call_argument(node, place, "dim", 0)) if value else None
    if value is None or axis is None:
        return _NO_FEATURES
    found = _numbers(analysis, node, _again(analysis, node, place), value.layout.split[axis])
    cuts = [_cut(value.layout, axis, numbers) for numbers in found or ()]
    known = [cut for cut in cuts if cut is not None]
    if not known or len(known) < len(cuts):
        return _NOT_FIXED
    return TupleValue(tuple(value.gather(node, *cut) for cut in known))


def flip(analysis: Analysis, node: fx.Node) -> Value:
    """Features in reverse, along some axes."""
    dims = _numbers_of(node.args[1:] or node.kwargs.get("dims"))
    return _taken(analysis, node, [(dim, lambda numbers: numbers.flip(0)) for dim in dims])


def roll(analysis: Analysis, node: fx.Node) -> Value:
    """Features that move on by some places, the last ones to the front, along some axes."""
    shifts = _numbers_of(call_argument(node, 1, "shifts"))
    dims = _numbers_of(call_argument(node, 2, "dims"))
    if len(dims) != len(shifts) or not all(type(shift) is int for shift in shifts):
        return _NO_FEATURES
    steps = [partial(torch.roll, shifts=shift, dims=0) for shift in shifts]
    return _taken(analysis, node, list(zip(dims, steps, strict=True)))


def index(analysis: Analysis, node: fx.Node) -> Value:
    """Features by a list of places or a mask, in brackets."""
    places = call_argument(node, 1, "indices")
    known = [dim for dim, place in enumerate(places) if place is not None]
    return _bracket(analysis, node, known[0], places[known[0]]) if len(known) == 1 else _NO_FEATURES


def getitem(analysis: Analysis, node: fx.Node) -> Value:
    """One of several pieces, or Python's own indexing of a tensor."""
    source, place = node.args
    value = analysis.values.get(source) if isinstance(source, fx.Node) else None
    if isinstance(value, TupleValue) and isinstance(place, int):
        return value.values[place].of(node)
    if isinstance(value, TupleValue) and isinstance(place, slice):
        return TupleValue(value.values[place])
    if not isinstance(place, tuple):
        return _NO_FEATURES
    lists = [(at, one) for at, one in enumerate(place) if isinstance(one, fx.Node)]
    others = [one for one in place if not isinstance(one, fx.Node)]
    if len(lists) == 1 and all(one in (..., slice(None)) for one in others):
        ((at, one),) = lists
        return _bracket(analysis, node, at - len(place) * (... in place[:at]), one)
    steps = steps_of(place)
    if steps is None:
        return _NO_FEATURES
    runs = [(dim, partial(_called, target, cut)) for target, (dim, *cut) in steps]
    return _taken(analysis, node, runs)


def constant_index(analysis: Analysis, node: Any, size: int) -> Index | None:
    """A constant mask or list of places."""
    if isinstance(node, list | tuple) and len(node) == 1:
        node = node[0]
    if not isinstance(node, fx.Node) or node not in analysis.constants.nodes:
        return None
    meta = analysis.constants.on_meta(node)
    if not isinstance(meta, torch.Tensor) or meta.ndim != 1 or meta.is_floating_point():
        return None
    return listed(torch.arange(size)[analysis.constants.value(node)])


def is_all(start: Any, stop: Any, step: Any) -> bool:
    """Whether a slice takes everything."""
    return start in (None, 0) and stop in (None, _END) and step in (None, 1)


def _taken(analysis: Analysis, node: fx.Node, steps: Sequence[tuple[Any, Run]]) -> Value:
    """What is taken of the features by steps along one axis each, one behind the other."""
    value, index = analysis.whole_map_of(node.args[0]), None
    if value is None:
        return _NO_FEATURES
    layout = value.layout
    for dim, run in steps:
        axis = layout.feature(dim)
        if axis is None:
            return _NO_FEATURES
        numbers = _numbers(analysis, node, run, layout.split[axis])
        cut = _cut(layout, axis, numbers) if isinstance(numbers, torch.Tensor) else None
        if cut is None:
            return _NOT_FIXED
        index, layout = cut[0] if index is None else then(index, cut[0]), cut[1]
    return value.gather(node, index, layout) if index else identity(analysis, node)


def _cut(layout: Layout, axis: int, numbers: torch.Tensor) -> tuple[Index, Layout] | None:
    """Which of all features some places of an axis are; a lone place has no axis any more."""
    index = listed(numbers.reshape(-1))
    split = (*layout.split[:axis], *numbers.shape, *layout.split[axis + 1 :])
    if index is None:
        return None
    return along(axis, layout.split, index), replace(layout, split=split)


def _numbers(analysis: Analysis, node: fx.Node, run: Run, size: int) -> Any:
    """What is taken of an axis of some size; None if the input has a say in it."""
    given: list[fx.Node] = []
    fx.node.map_arg((node.args[1:], node.kwargs), given.append)
    if any(source not in analysis.constants.nodes for source in given):
        return None
    try:
        return run(torch.arange(size))
    except (RuntimeError, IndexError, TypeError, ValueError):
        return None  # the graph's own call fails too, and says why


def _again(analysis: Analysis, node: fx.Node, place: int) -> Run:
    """The same call of a list of numbers, whose axis is called ``dim`` or stands at a place."""

    def run(numbers: torch.Tensor) -> Any:
        args = list(fx.node.map_arg(node.args[1:], analysis.constants.value))
        kwargs = dict(fx.node.map_arg(node.kwargs, analysis.constants.value))
        if "dim" in kwargs:
            kwargs["dim"] = 0
        args[place - 1 : place] = [0] * len(args[place - 1 : place])
        call: Any = node.target
        if node.op == "call_method":
            call = getattr(torch.Tensor, str(node.target))
        return call(numbers, *args, **kwargs)

    return run


def _called(target: Any, arguments: Sequence[Any], numbers: torch.Tensor) -> Any:
    return target(numbers, 0, *arguments)


def _bracket(analysis: Analysis, node: fx.Node, dim: int, place: fx.Node) -> Value:
    """Places in brackets: a list or a mask; one alone is no list."""

    def run(numbers: torch.Tensor) -> Any:
        places = analysis.constants.value(place)
        return numbers[places] if isinstance(places, torch.Tensor) and places.ndim else None

    return _taken(analysis, node, [(dim, run)])


def _numbers_of(given: Any) -> list[Any]:
    """One number, several, or a list of them, as a list."""
    if isinstance(given, Iterable):
        return [number for one in given for number in _numbers_of(one)]
    return [] if given is None else [given]
