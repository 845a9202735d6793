"""Weights of which calls read parts: folded, they stay one, and the parts are picked again.

``linear(x, chunk(W)[0], b)  ->  linear(x, chunk(W')[0], b)``: the layer keeps its path and shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import combinations
from math import prod

import torch
from torch import fx

from lora_fx.affine.analysis import Analysis
from lora_fx.affine.region import Region
from lora_fx.algebra.evaluate import dense
from lora_fx.algebra.matrix_expr import Matrix
from lora_fx.graph.editor import Editor
from lora_fx.graph.lazy_tensor import LazyTensor, TensorSnapshot
from lora_fx.layers.layer_types import OPERATORS, operands_of
from lora_fx.layers.sites import Site, by_path, is_one_way
from lora_fx.layers.weight_parts import Places
from lora_fx.numerics import widened

_AGREES = 1e-6  # of the largest weight: what rounding does to parts that were composed apart
Round = Callable[[torch.Tensor, str], torch.Tensor]
Key = tuple[Places | None, Places | None]


class Pack:
    """One weight, the calls that read it, and the regions that some of them fold into.

    Attributes:
        calls: of the layer, by node.
        regions: by the node of their layer.
    """

    def __init__(
        self,
        editor: Editor,
        analysis: Analysis,
        calls: Sequence[Site],
        regions: Mapping[fx.Node, Region],
    ) -> None:
        self.calls = {site.node: site for site in calls}
        self.regions = {node: regions[node] for node in self.calls if node in regions}
        self._editor, self._analysis, self._first = editor, analysis, calls[0]
        self._held = TensorSnapshot.of(editor.gm, str(calls[0].weight.target))
        self._now: dict[fx.Node, fx.Node] = {}

    @property
    def is_one(self) -> bool:
        """Whether there is one weight that every call could read its part of."""
        if all(site.is_whole for site in self.calls.values()) or not self.regions:
            return False
        if not is_one_way(list(self.calls.values())) or any(map(_is_replaced, self.calls)):
            return False
        wanted = {node: _shape(site) for node, site in self.calls.items()}
        fits = all(self._matrix(node).shape == wanted[node] for node in self.regions)
        # A table has no bias: what one would be is in its rows.
        shifts = self._first.type.reads_ids and any(map(self._bias, self.regions))
        return fits and not shifts and self._agrees()

    def operand(self, layer: fx.Node, round_to: Round) -> fx.Node:
        """What a call reads of the folded weight."""
        if not self._now:
            self._make(round_to)
        return self._now[layer]

    @property
    def weight(self) -> fx.Node:
        """The node of the stored weight."""
        return self._first.weight

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight."""
        return self._first.dtype

    def bias_of(self, layer: fx.Node) -> fx.Node | None:
        """The bias that a call reads."""
        return self.calls[layer].bias

    def rest(self) -> Iterator[fx.Node]:
        """The calls that no region stands for: they read the folded weight as well."""
        return (node for node in self.calls if node not in self.regions)

    def _make(self, round_to: Round) -> None:
        name, shape, dtype = self._held.name, tuple(self._held.value.shape), self._first.dtype
        key = ("packed", name, tuple(self._parts.items()))
        whole = partial(self._rounded, round_to)
        value = LazyTensor(shape, dtype, whole, key)
        if self._is_trained():
            value.materialize()
        order = sorted(self.calls, key=self._place)
        weight = self._editor.constant(name, value, before=self._place(order[0]))
        reads = (read for site in self.calls.values() for read in site.reads)
        known: Mapping[fx.Node, fx.Node] = {leaf: weight for _, leaf in reads}
        for node in order:  # a pick of several calls is made again for the first
            calls = self.calls[node].part.calls
            known = self._editor.again(calls, known, self._place(node))
            self._now[node] = known[self.calls[node].operand]

    def _place(self, node: fx.Node) -> fx.Node:
        """Where a call is, or the layer of its region goes, which may be earlier."""
        return self.regions[node].place if node in self.regions else node

    def _is_trained(self) -> bool:
        constants = self._analysis.constants
        return any(constants.is_trained(r.nodes, but=r.layer) for r in self.regions.values())

    def _matrix(self, node: fx.Node) -> Matrix:
        region = self.regions[node]
        return region.value.relative_to(region.source)[0]

    def _bias(self, node: fx.Node) -> Matrix | None:
        region = self.regions[node]
        return region.value.relative_to(region.source)[1]

    @cached_property
    def _parts(self) -> dict[Key, list[Matrix | None]]:
        """What the calls that read a part make of it; None is what is stored."""
        found: dict[Key, list[Matrix | None]] = {}
        for node, site in self.calls.items():
            matrix = self._matrix(node) if node in self.regions else None
            known = found.setdefault((site.part.rows, site.part.columns), [])
            if matrix not in known:
                known.append(matrix)
        return {key: tuple(known) for key, known in found.items()}  # type: ignore[misc]

    def _agrees(self) -> bool:
        """Whether no two calls want something different at one place."""
        alone = all(len(known) == 1 for known in self._parts.values())
        if alone and not any(_meet(*pair) for pair in combinations(self._parts, 2)):
            return True
        whole, stored = self._whole(), self._wide()
        scale = _AGREES * float(whole.abs().max())
        return all(
            bool(((self._value(matrix, stored, key) - whole[_at(key, whole)]).abs() <= scale).all())
            for key, known in self._parts.items()
            for matrix in known
        )

    def _whole(self) -> torch.Tensor:
        stored = self._wide()
        whole = stored.clone()
        for key, (matrix, *_) in self._parts.items():
            whole[_at(key, whole)] = self._value(matrix, stored, key)
        return whole

    def _rounded(self, round_to: Round) -> torch.Tensor:
        return round_to(self._whole(), self._held.name)

    def _wide(self) -> torch.Tensor:
        return widened(self._held.read())

    def _value(self, matrix: Matrix | None, stored: torch.Tensor, key: Key) -> torch.Tensor:
        if matrix is None:
            return stored[_at(key, stored)]
        value = dense(matrix, stored.dtype)
        own = value.reshape(len(value), -1, *stored.shape[2:])  # and a kernel
        return self._first.type.store("weight", own)


def packs_of(editor: Editor, analysis: Analysis, regions: Sequence[Region]) -> dict[fx.Node, Pack]:
    """The packs of a graph that is folded, by the node of each of their calls."""
    by_layer = {region.layer: region for region in regions if not region.blocked}
    packs = [Pack(editor, analysis, calls, by_layer) for calls in by_path(editor.gm).values()]
    return {node: pack for pack in packs if pack.is_one for node in pack.calls}


def _is_replaced(call: fx.Node) -> bool:
    """Whether another operator takes the place of a folded call: the others would keep theirs."""
    known = call.target in OPERATORS
    return known and operands_of(call.target).folded is not None


def _shape(site: Site) -> tuple[int, int]:
    """Rows and columns of what a call reads, as a matrix."""
    out = site.out_features if site.outputs is None else len(site.outputs)
    into = site.in_features if site.inputs is None else len(site.inputs)
    return out, into * prod(site.shape[2:])


def _at(key: Key, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = (
        torch.arange(size) if places is None else torch.tensor(list(places))
        for places, size in zip(key, whole.shape[:2], strict=True)
    )
    return rows[:, None], columns


def _meet(one: Key, other: Key) -> bool:
    """Whether two parts have a place in common."""
    axes = zip(one, other, strict=True)
    return all(a is None or b is None or not set(a).isdisjoint(b) for a, b in axes)
