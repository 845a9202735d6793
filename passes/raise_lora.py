"""Reads low-rank branches out of a graph, however they were spelled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx

from lora_fx.adapters.adapter import Adapter, Update
from lora_fx.affine.affine_map import AffineMap
from lora_fx.affine.analysis import Analysis
from lora_fx.affine.region import Region
from lora_fx.affine.region_boundary import BaseWeight, input_of, stored_term, weight_of
from lora_fx.affine.region_selection import maximal_regions
from lora_fx.affine.transfer import analyse
from lora_fx.algebra.low_rank import NotLowRankError, column_beside, factors_beside
from lora_fx.graph.editor import Editor
from lora_fx.graph.ops import aten, holder_path, module_path
from lora_fx.graph.pass_base import Pass
from lora_fx.injection.branches import branches_of, col_of
from lora_fx.injection.injected_adapters import injected, remember
from lora_fx.layers.sites import Site, paths_of, sites
from lora_fx.passes.inject_lora import InjectLora


@dataclass(frozen=True)
class RaiseLora(Pass):
    """``<whatever equals x W + x A B + b>  ->  add(linear(x, W, b), matmul(matmul(x, A), B))``.

    The analysis is that of `FoldLora`, but the base layer stays and what is added to it becomes
    the branch that `InjectLora` makes: a model that somebody else's LoRA was written into becomes
    swappable, and `adapter_from` gives back its adapter. Several products are one branch, whose
    rank is the sum of theirs.

    Leaves alone, and says why, regions that scale their base (DoRA), add a matrix of no known
    factors (LoHa, LoKr), or hold a convolution in groups.

    Attributes:
        name: what the adapter is called from then on.
    """

    name: str = "default"

    @torch.no_grad()
    def rewrite(self, editor: Editor) -> None:
        """Puts the base layer in place of each region, then the branches beside them."""
        analysis = analyse(editor.gm)
        layers = {site.node: site for site in sites(editor.gm)}
        updates: dict[str, Update] = {}
        every: list[_Raised] = []
        for path, found in _found(editor, analysis, layers).items():
            updates[path] = found[0].update
            every += found
        # The last first: a region reads the end of an earlier one, which is replaced afterwards.
        for raised in sorted(every, key=lambda one: one.region.value.node, reverse=True):
            _strip(editor, raised.region, raised.base)
        editor.sweep()
        if updates:
            known = injected(editor.gm)
            InjectLora(Adapter(self.name, updates)).rewrite(editor)
            remember(editor.gm, known)  # the model holds it already: nothing was put in


class _Raised(NamedTuple):
    """A region as its layer and what it adds to that."""

    region: Region
    base: BaseWeight
    update: Update


def _found(
    editor: Editor, analysis: Analysis, layers: Mapping[fx.Node, Site]
) -> dict[str, list[_Raised]]:
    """The regions that can be raised, and what each adds, by the path of their layer."""
    regions = [
        region
        for region in reversed(maximal_regions(analysis))
        if region.value.node not in _branched(layers.get(region.layer))
    ]
    bases = {region.layer: _base_of(analysis, region, layers) for region in regions}
    paths = _paths(layers, bases)
    found: dict[str, list[_Raised]] = defaultdict(list)
    for region in regions:
        path = paths.get(region.layer, module_path(region.layer))
        try:
            found[path] += [_raised(analysis, region, bases[region.layer], layers)]
        except NotLowRankError as reason:
            editor.record("skip", path, str(reason))
    for path, raised in found.items():
        if raised and not _is_everywhere({n for n, its in paths.items() if its == path}, raised):
            editor.record("skip", path, "its calls are updated differently")
            raised.clear()
    while stays := _staying(editor.gm.graph, [one for raised in found.values() for one in raised]):
        for path, raised in found.items():
            if any(one.region.layer in stays for one in raised):
                editor.record("skip", path, "its call is also read where nothing is added to it")
                raised.clear()
    return {path: raised for path, raised in found.items() if raised}


def _staying(graph: fx.Graph, found: Sequence[_Raised]) -> set[fx.Node]:
    """The layers that something reads even when all regions are replaced: they would be two."""
    starts = {one.region.value.node: [one.region.before.start] for one in found}
    pending = [node for node in graph.nodes if not node.users]
    seen: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending += starts.get(node, node.all_input_nodes)
    return (seen - starts.keys()) & {one.region.layer for one in found}


def _branched(site: Site | None) -> set[fx.Node]:
    """The call of a layer, and its sums with branches."""
    return {site.node, *(branch.out for branch in branches_of(site))} if site else set()


def _base_of(
    analysis: Analysis, region: Region, layers: Mapping[fx.Node, Site]
) -> BaseWeight | None:
    """What a layer multiplies with: a stored weight, alone or as one of the terms of a sum."""
    layer = region.layer
    site, own = layers.get(layer), analysis.values[layer]
    if region.blocked or not isinstance(own, AffineMap):
        return None
    if site is not None:
        found = BaseWeight(own.weight, site.weight, site.part.calls)
        return found if site.is_whole else None
    return stored_term(layer, analysis)


def _paths(
    layers: Mapping[fx.Node, Site], bases: Mapping[fx.Node, BaseWeight | None]
) -> dict[fx.Node, str]:
    """What each call of a layer is called, once nothing is added to its weight."""
    stored = {node: site.weight for node, site in layers.items()}
    stored |= {layer: base.stored for layer, base in bases.items() if base}
    calls = {node: (holder_path(node), str(weight.target)) for node, weight in stored.items()}
    names = paths_of(calls.values())
    return {node: names[call] for node, call in calls.items()}


def _raised(
    analysis: Analysis, region: Region, base: BaseWeight | None, layers: Mapping[fx.Node, Site]
) -> _Raised:
    """A region, where it is a layer and what is added to it.

    Raises:
        NotLowRankError: it is not; says why.
    """
    own, site = analysis.values[region.layer], layers.get(region.layer)
    if site is not None and col_of(site) is not None:
        raise NotLowRankError("an adapter scales what it reads, and a branch reads what was before")
    if region.blocked or base is None or not isinstance(own, AffineMap):
        reason = "it reads a part of its weight, or none that is stored"
        raise NotLowRankError(region.blocked or reason)
    weight, bias = region.value.relative_to(region.source)
    down, up = factors_beside(base.weight, weight, any_rank=True)
    return _Raised(region, base, Update(down, up, 1.0, bias=column_beside(own.bias, bias)))


def _is_everywhere(calls: Set[fx.Node], found: Sequence[_Raised]) -> bool:
    """Whether all calls of a layer get the same update, since they share its weight."""
    first, *others = [raised.update for raised in found]
    same = all(
        torch.equal(first.down, other.down) and torch.equal(first.up, other.up) for other in others
    )
    same = same and all(_is_same(first.bias, other.bias) for other in others)
    return same and calls <= {raised.region.layer for raised in found}


def _is_same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def _strip(editor: Editor, region: Region, base: BaseWeight) -> None:
    """The base layer alone, where the region was."""
    layer, end, place = region.layer, region.value.node, region.place
    x = editor.along(region.before.moves, region.before.start, place)
    known = dict(editor.again(base.calls, {input_of(layer): x}, place))
    if base.in_sum:
        turn = aten.transpose.int, (base.stored, 0, 1)
        turned = editor.call(*turn, before=place, like=layer) if base.is_turned else base.stored
        known[weight_of(layer)] = turned
    rest = fx.node.map_arg(layer.args, lambda node: known.get(node, node))
    stripped = editor.call(layer.target, rest, before=place, like=layer)
    editor.replace(end, editor.along(region.behind.moves, stripped, place))
