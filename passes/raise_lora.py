"""Reads low-rank branches out of a graph, however they were spelled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from lora_fx.adapters.adapter import Adapter, Update
from lora_fx.affine.affine_map import AffineMap
from lora_fx.affine.analysis import Analysis
from lora_fx.affine.region import Region
from lora_fx.affine.region_boundary import input_of
from lora_fx.affine.region_selection import maximal_regions
from lora_fx.affine.transfer import analyse
from lora_fx.algebra.low_rank import NotLowRankError, column_beside, factors_beside
from lora_fx.graph.editor import Editor
from lora_fx.graph.ops import module_path
from lora_fx.graph.pass_base import Pass
from lora_fx.injection.branches import branches_of, col_of
from lora_fx.injection.injected_adapters import injected, remember
from lora_fx.layers.matrix_products import product_of
from lora_fx.layers.sites import Site, by_path, sites
from lora_fx.passes.inject_lora import InjectLora


@dataclass(frozen=True)
class RaiseLora(Pass):
    """``<whatever equals x W + x A B + b>  ->  add(linear(x, W, b), matmul(matmul(x, A), B))``.

    The analysis is that of `FoldLora`, but the base layer stays and what is added to it becomes
    the branch that `InjectLora` makes: a model that somebody else's LoRA was written into becomes
    swappable, and `adapter_from` gives back its adapter. Several products are one branch, whose
    rank is the sum of theirs.

    Leaves alone, and says why, regions that scale their base (DoRA), add a matrix of no known
    factors (LoHa, LoKr), or hold an embedding or a convolution.

    Attributes:
        name: what the adapter is called from then on.
    """

    name: str = "default"

    @torch.no_grad()
    def rewrite(self, editor: Editor) -> None:
        """Puts the base layer in place of each region, then the branches beside them."""
        analysis = analyse(editor.gm)
        layers = {site.node: site for site in sites(editor.gm)}
        found = _found(editor, analysis, layers)
        updates: dict[str, Update] = {}
        for path, regions in found.items():
            if _is_everywhere(editor, path, regions):
                updates[path] = regions[0][1]
                for region, _ in regions:
                    _strip(editor, region, layers[region.layer])
            else:
                editor.record("skip", path, "its calls are updated differently")
        editor.sweep()
        if updates:
            known = injected(editor.gm)
            InjectLora(Adapter(self.name, updates)).rewrite(editor)
            remember(editor.gm, known)  # the model holds it already: nothing was put in


def _found(
    editor: Editor, analysis: Analysis, layers: Mapping[fx.Node, Site]
) -> dict[str, list[tuple[Region, Update]]]:
    """The regions that can be raised, and what each adds, by the path of their layer."""
    found: dict[str, list[tuple[Region, Update]]] = defaultdict(list)
    for region in reversed(maximal_regions(analysis)):
        site = layers.get(region.layer)
        path = site.path if site else module_path(region.layer)
        if site is not None and region.value.node in _branched(site):
            continue  # a layer alone, or a branch already
        try:
            found[path] += [(region, _update(analysis, region, site))]
        except NotLowRankError as reason:
            editor.record("skip", path, str(reason))
    return {path: regions for path, regions in found.items() if regions}


def _branched(site: Site) -> set[fx.Node]:
    """The call of a layer, and its sums with branches."""
    return {site.node, *(branch.out for branch in branches_of(site))}


def _update(analysis: Analysis, region: Region, site: Site | None) -> Update:
    """What a region adds to its layer."""
    if site is None or not site.is_whole:
        raise NotLowRankError("it reads a part of its weight, or none that is stored")
    if col_of(site) is not None:
        raise NotLowRankError("an adapter scales what it reads, and a branch reads what was before")
    own = analysis.values[region.layer]
    if region.blocked or product_of(region.layer) is None or not isinstance(own, AffineMap):
        raise NotLowRankError(region.blocked or "a branch stands beside a linear layer only")
    weight, bias = region.value.relative_to(region.source)
    down, up = factors_beside(own.weight, weight)
    return Update(down, up, 1.0, bias=column_beside(own.bias, bias))


def _is_everywhere(editor: Editor, path: str, found: list[tuple[Region, Update]]) -> bool:
    """Whether all calls of a layer get the same update, since they share its weight."""
    first = found[0][1]
    same = all(
        torch.equal(first.down, other.down) and torch.equal(first.up, other.up)
        for _, other in found[1:]
    )
    calls = by_path(editor.gm).get(path, [])
    return same and {site.node for site in calls} <= {region.layer for region, _ in found}


def _strip(editor: Editor, region: Region, site: Site) -> None:
    """The base layer alone, where the region was."""
    layer, end, place = region.layer, region.value.node, region.place
    x = editor.along(region.before.moves, region.before.start, place)
    known = editor.again(site.part.calls, {input_of(layer): x}, place)
    rest = fx.node.map_arg(layer.args, lambda node: known.get(node, node))
    base = editor.call(layer.target, rest, before=place, like=layer)
    editor.replace(end, editor.along(region.behind.moves, base, place))
