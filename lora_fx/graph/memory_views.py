"""Views: which memory each shows, and what the base holds once a view is written to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lora_fx.graph.aliasing import storages
from lora_fx.graph.ops import aten, call_argument, op_name

Call = Callable[..., fx.Node]
Undo = Callable[[Call, fx.Node, fx.Node, fx.Node], fx.Node | None]

_END = 9223372036854775807  # the stop of a slice that has none


def viewed(node: fx.Node) -> fx.Node | None:
    """What a node is surely a view of, if the view can be said again of other memory."""
    name = op_name(node)
    if not node.args or not isinstance(source := node.args[0], fx.Node):
        return None
    if name in _PERHAPS and not _is_seen(node, source):
        return None
    if name == "getitem" and op_name(source) not in PIECES and not _is_cut(node, source):
        return None
    is_known = name in _UNDO or name in PIECES
    as_bits = any(isinstance(value, torch.dtype) for value in node.args) and name == "view"
    return source if is_known and not as_bits else None


def path_to(node: fx.Node) -> list[fx.Node]:
    """From the memory itself to a view of it, step by step."""
    path = [node]
    while (source := viewed(path[0])) is not None:
        path.insert(0, source)
    return path


def put_back(call: Call, path: list[fx.Node], value: fx.Node | None) -> fx.Node | None:
    """What the start of a path holds once its end holds a value, or None if that has no name."""
    for outer, inner in zip(reversed(path[:-1]), reversed(path[1:]), strict=True):
        if op_name(inner) in PIECES or value is None:
            continue  # undone where one of the pieces was taken
        whole = outer.args[0] if op_name(outer) in PIECES else outer
        assert isinstance(whole, fx.Node)
        value = _UNDO[op_name(inner)](call, whole, inner, value)
    return value


def assigned(call: Call, whole: fx.Node, places: Any, value: Any) -> fx.Node | None:
    """What a tensor holds after ``whole[places] = value``; None where places are not plain."""
    steps = steps_of(places)
    if steps is None:
        return None
    path = [whole]
    for target, arguments in steps:
        path.append(call(target, path[-1], *arguments))
    is_number = not isinstance(value, fx.Node)
    target = aten.fill.Scalar if is_number else aten.copy.default
    return put_back(call, path, call(target, path[-1], value))


def _is_seen(node: fx.Node, source: fx.Node) -> bool:
    """Whether the tracer saw that a node shares memory with what it reads."""
    own = storages(node.meta.get("val"))
    return bool(own) and own == storages(source.meta.get("val"))


def _is_cut(node: fx.Node, source: fx.Node) -> bool:
    """Whether Python's indexing takes a part of a tensor, and not one of several results."""
    seen, places = source.meta.get("val"), node.args[1]
    is_tensor = isinstance(places, tuple) if seen is None else isinstance(seen, torch.Tensor)
    return is_tensor and bool(steps_of(places))


def steps_of(places: Any) -> list[tuple[Any, tuple[Any, ...]]] | None:
    """Python's indexing as selections and slices, one at a time, or None if it is more."""
    given = list(places) if isinstance(places, tuple) else [places]
    if any(not (v is ... or isinstance(v, slice) or type(v) is int) for v in given):
        return None
    cut = given.index(...) if ... in given else len(given)
    steps: list[tuple[Any, tuple[Any, ...]]] = []
    dim = 0
    for place in given[:cut]:
        steps += _step(place, dim)
        dim += isinstance(place, slice)
    dim = -1
    for place in reversed(given[cut + 1 :]):
        steps += _step(place, dim)
        dim -= isinstance(place, slice)
    return steps


def _step(place: Any, dim: int) -> list[tuple[Any, tuple[Any, ...]]]:
    if type(place) is int:
        return [(aten.select.int, (dim, place))]
    if place == slice(None):
        return []
    return [(aten.slice.Tensor, (dim, place.start or 0, _end(place.stop), place.step or 1))]


def _end(stop: Any) -> Any:
    return _END if stop is None else stop


def _same(call: Call, outer: fx.Node, inner: fx.Node, value: fx.Node) -> fx.Node:
    return value


def _beside(call: Call, outer: fx.Node, inner: fx.Node, value: fx.Node) -> fx.Node:
    return call(aten.view_as.default, value, outer)


def _expanded(call: Call, outer: fx.Node, inner: fx.Node, value: fx.Node) -> fx.Node | None:
    """Memory that is repeated takes no writes: nothing was."""
    return call(aten.view_as.default, value, outer) if "val" in outer.meta else None


def _scattered(target: Any) -> Undo:
    def undo(call: Call, outer: fx.Node, inner: fx.Node, value: fx.Node) -> fx.Node:
        return call(target, outer, _plain(value), *inner.args[1:], **inner.kwargs)

    return undo


def _plain(value: fx.Node) -> fx.Node:
    """What was copied, if it fits as it is: a scatter copies once more."""
    if value.target is aten.clone.default:
        return value.args[0]  # type: ignore[return-value]
    if value.target is aten.copy.default and all("val" in n.meta for n in value.all_input_nodes):
        old, new = (n.meta["val"] for n in value.args)  # type: ignore[union-attr]
        if old.dtype == new.dtype and old.ndim == new.ndim and str(old.shape) == str(new.shape):
            return value.args[1]  # type: ignore[return-value]
    return value


def _narrowed(call: Call, outer: fx.Node, inner: fx.Node, value: fx.Node) -> fx.Node | None:
    dim, start, length = (call_argument(inner, i, n) for i, n in enumerate(_NARROW, 1))
    if type(start) is not int or type(length) is not int:
        return None
    end = _END if start < 0 and start + length == 0 else start + length
    return call(aten.slice_scatter.default, outer, _plain(value), dim, start, end)


def _turned(target: Any) -> Undo:
    def undo(call: Call, outer: fx.Node, inner: fx.Node, value: fx.Node) -> fx.Node:
        return call(target, value, *inner.args[1:], **inner.kwargs)

    return undo


def _permuted(call: Call, outer: fx.Node, inner: fx.Node, value: fx.Node) -> fx.Node:
    several = len(inner.args) > 2
    given: Any = inner.args[1:] if several else call_argument(inner, 1, "dims")
    order = [axis % len(given) for axis in given]
    return call(aten.permute.default, value, [order.index(axis) for axis in range(len(order))])


def _moved(call: Call, outer: fx.Node, inner: fx.Node, value: fx.Node) -> fx.Node:
    source, destination = call_argument(inner, 1, "source"), call_argument(inner, 2, "destination")
    return call(inner.target, value, destination, source)


def _taken(call: Call, outer: fx.Node, inner: fx.Node, value: fx.Node) -> fx.Node | None:
    """One of several pieces, or Python's slices of a tensor."""
    pieces, place = inner.args
    assert isinstance(pieces, fx.Node)
    if op_name(pieces) not in PIECES:
        path = [outer]
        for target, arguments in steps_of(place) or []:
            path.append(call(target, path[-1], *arguments))
        return put_back(call, path, value)
    if op_name(pieces) == "unbind":
        return call(aten.select_scatter.default, outer, _plain(value), _dim(pieces, 1), place)
    seen, dim = pieces.meta.get("val"), _dim(pieces, 2)
    sizes: list[Any] = [None]
    if seen:
        sizes = [piece.shape[dim] for piece in seen[: int(place) + 1]]  # type: ignore[arg-type]
    if not all(type(size) is int for size in sizes):
        return None
    ends = sum(sizes[:-1]), sum(sizes)
    return call(aten.slice_scatter.default, outer, _plain(value), dim, *ends)


def _dim(pieces: fx.Node, place: int) -> int:
    return int(call_argument(pieces, place, "dim", 0))


_NARROW = ("dim", "start", "length")
# Operators that give several views.
PIECES = {
    *("split", "split_with_sizes", "chunk", "unbind", "tensor_split"),
    *("unsafe_split", "unsafe_chunk"),
}
# What returns a view only if it can, or nothing but what it was given.
_PERHAPS = {
    *("reshape", "reshape_as", "flatten", "ravel", "contiguous", "to", "type_as", "dropout"),
    *("expand", "expand_as", "_unsafe_view", "tensor_split", "feature_dropout", "float", "half"),
    *("double", "bfloat16", "unsafe_split", "unsafe_chunk"),
}
_UNDO: dict[str, Undo] = {
    **dict.fromkeys(("alias", "detach", "contiguous", "to", "type_as", "dropout"), _same),
    **dict.fromkeys(("feature_dropout", "float", "half", "double", "bfloat16"), _same),
    **dict.fromkeys(("view", "view_as", "reshape", "reshape_as", "flatten", "ravel"), _beside),
    **dict.fromkeys(("unflatten", "squeeze", "unsqueeze", "_unsafe_view"), _beside),
    **dict.fromkeys(("expand", "expand_as"), _expanded),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _turned(aten.transpose.int)),
    **{name: _turned(getattr(aten, name).default) for name in ("t", "numpy_T", "mT")},
    **dict.fromkeys(("movedim", "moveaxis"), _moved),
    "permute": _permuted,
    "slice": _scattered(aten.slice_scatter.default),
    "select": _scattered(aten.select_scatter.default),
    "diagonal": _scattered(aten.diagonal_scatter.default),
    "narrow": _narrowed,
    "getitem": _taken,
}
