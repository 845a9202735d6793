"""Assignments to places that are known before a call: a gather, where ONNX has no masks.

``y[..., mask] = v`` is an `index_put` with a boolean index, which torch.onnx translates for the
first axis alone. A constant mask is a list of places, and whatever is assigned, ``cat([y, v])``
holds the result: one constant list says where each place is taken from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from lora_fx.export.onnx_model.known_values import KnownValues
from lora_fx.export.program.decompose import splice
from lora_fx.graph.ops import aten, call_argument, same_sizes

Tensor = torch.Tensor
_PUTS = {aten.index_put.default, aten._unsafe_index_put.default}
_WRITES = {aten.index_put_.default}
_READS = {aten.index.Tensor, aten._unsafe_index.Tensor}


def has_masks(program: torch.export.ExportedProgram) -> bool:
    """Whether anything is written or read by a boolean index."""
    return any(_is_masked(n) for n in program.graph.nodes if n.target in _PUTS | _WRITES | _READS)


def without_masks(program: torch.export.ExportedProgram) -> None:
    """Rewrites what is written and read by constant indices, in place.

    Before -> after: ``index_put(y, [None, mask], v)`` -> ``index_select(cat([y, v], 1), 1, p)``,
    and ``index(y, [None, mask])`` -> ``index_select(y, 1, places)``. An index that the inputs have
    a say in stays as it is.
    """
    state = KnownValues(program)
    for node in list(program.graph.nodes):
        if node.target in _PUTS | _READS and _is_masked(node):
            given = call_argument(node, 1, "indices")
            indices = [None if index is None else state.value(index) for index in given]
            is_known = sum(i is None for i in indices) == sum(i is None for i in given)
            places = _places(node.args[0].meta["val"], indices) if is_known else None
            if places is not None:
                _rewrite(state, node, places)
    program.graph_module.recompile()


def _is_masked(node: fx.Node) -> bool:
    kinds = [i.meta["val"].dtype for i in call_argument(node, 1, "indices") if i is not None]
    return torch.bool in kinds or torch.uint8 in kinds


@dataclass(frozen=True)
class _Places:
    """Places along some axes, as if these were one.

    Attributes:
        axes: those that are indexed.
        sizes: of them.
        shape: of what is picked, in place of them.
        flat: the places, in the order of what is picked.
    """

    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...]
    flat: Tensor

    @property
    def at(self) -> int:
        """Where the one axis is: in front, if there are others between those that are indexed."""
        return self.axes[0] if self._together else 0

    @property
    def _together(self) -> bool:
        return self.axes[-1] - self.axes[0] + 1 == len(self.axes)

    def gathered(self, x: Tensor) -> Tensor:
        """A tensor with these axes as one."""
        moved = x if self._together else x.movedim(self.axes, tuple(range(len(self.axes))))
        return moved.flatten(self.at, self.at + len(self.axes) - 1)

    def scattered(self, x: Tensor) -> Tensor:
        """The reverse."""
        apart: Tensor = aten.unflatten.int(x, self.at, self.sizes)
        return apart if self._together else apart.movedim(tuple(range(len(self.axes))), self.axes)

    def sources(self) -> Tensor:
        """Of each place: itself, or where it stands behind all of them, by the last write."""
        found = torch.arange(prod(self.sizes))
        found[self.flat] = len(found) + torch.arange(len(self.flat))
        return found


def _places(into: Tensor, indices: Sequence[Tensor | None]) -> _Places | None:
    """The places that constant indices mean, or None if the sizes of their axes are open."""
    axes: list[int] = []
    found: list[Tensor] = []
    axis = 0
    for index in indices:
        is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        lists = () if index is None else index.nonzero().unbind(1) if is_mask else (index,)
        axes += range(axis, axis + len(lists))
        found += lists
        axis += len(lists) if index is not None else 1
    sizes = tuple(into.shape[axis] for axis in axes)
    if not all(type(size) is int for size in sizes):
        return None
    within = [i % size for i, size in zip(found, sizes, strict=True)]
    each = aten.broadcast_tensors.default(within)
    steps = [prod(sizes[place + 1 :]) for place in range(len(sizes))]
    flat = reduce(torch.add, (i * step for i, step in zip(each, steps, strict=True)))
    return _Places(tuple(axes), sizes, tuple(flat.shape), flat.reshape(-1))


def _rewrite(state: KnownValues, node: fx.Node, places: _Places) -> None:
    def read(x: Tensor, flat: Tensor) -> Tensor:
        picked = places.gathered(x).index_select(places.at, flat)
        found: Tensor = aten.unflatten.int(picked, places.at, places.shape)
        return found

    def put(x: Tensor, flat: Tensor, values: Tensor, sources: Tensor) -> Tensor:
        picked = read(x, flat)
        if call_argument(node, 3, "accumulate", False):  # a mask names no place twice
            values = picked + values
        if not same_sizes(tuple(values.shape), tuple(picked.shape)):
            values = values.expand_as(picked)
        both = [places.gathered(x), values.flatten(places.at, places.at + len(places.shape) - 1)]
        return places.scattered(torch.cat(both, places.at).index_select(places.at, sources))

    x: Any = node.args[0]
    inputs = [x, state.constant(places.flat)]
    if node.target in _PUTS:
        inputs += [node.args[2], state.constant(places.sources())]
    function = put if node.target in _PUTS else read
    parts = make_fx(function)(*(n.meta["val"] for n in inputs))
    parts.graph.eliminate_dead_code()
    splice(node, parts.graph, inputs)
