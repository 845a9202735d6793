"""Which affine regions of a graph are worth one layer."""

from __future__ import annotations

from torch import fx

from lora_fx.affine.affine_map import AffineMap, Link
from lora_fx.affine.analysis import Analysis
from lora_fx.affine.region import Region, calls_between, candidates, region_between
from lora_fx.affine.region_boundary import is_stored
from lora_fx.graph.ops import is_around

_ROUNDS = 8  # graphs of a hundred random steps settle in three


def maximal_regions(analysis: Analysis, chains: bool = False) -> list[Region]:
    """The regions that are part of no larger one, last first.

    A region that is not blocked is taken to be replaced: what only it reads is gone, and what is
    still read from elsewhere gets a region of its own. A replacement can free an earlier region,
    or leave a weight to one reader, so all are looked at again.
    """
    gone: set[fx.Node] = set()
    for _ in range(_ROUNDS):
        before, (found, gone) = gone, _scan(analysis, gone, chains)
        if gone == before:
            break
    return found


def _scan(
    analysis: Analysis, earlier: set[fx.Node], chains: bool
) -> tuple[list[Region], set[fx.Node]]:
    """One look at a graph of which some calls are known to go."""
    found: list[Region] = []
    gone: set[fx.Node] = set()
    kept: set[fx.Node] = set()
    known = set(earlier)
    for node in reversed(list(analysis.values)):
        if node.users and node not in kept and all(user in gone for user in node.users):
            gone.add(node)
            known.add(node)
            continue
        region = _region(node, analysis, known, chains)
        if region is None:
            continue
        if not region.blocked:
            gone.add(node)
            known.add(node)
            kept.add(region.before.start)
        found.append(region)
    return found, gone


def _region(node: fx.Node, analysis: Analysis, gone: set[fx.Node], chains: bool) -> Region | None:
    """The largest region that ends here and may be replaced, or else one that may not."""
    value = analysis.values.get(node)
    if not isinstance(value, AffineMap) or value.node is not node or value.parent is None:
        return None
    best: Region | None = None
    for source in _sources(value, analysis, chains):
        region = region_between(value, source, analysis, gone)
        if region is not None and (best is None or best.blocked or not region.blocked):
            best = region
    return best


def _sources(value: AffineMap, analysis: Analysis, chains: bool) -> list[AffineMap]:
    """How far up a region may reach: over one layer, and what its own modules do around it."""
    found: list[AffineMap] = []
    layer: fx.Node | None = None
    is_found = False
    glue: list[fx.Node] = []
    here = value
    while here.parent is not None:
        own = _layer_of(here, analysis)
        glue += here.glued()
        if own is not None and is_stored(own, analysis):
            if is_found and not chains:
                break
            is_found = True
            layer = layer if layer is not None and is_stored(layer, analysis) else own
        layer = layer or own
        if layer is not None and not chains and not all(is_around(n, layer) for n in glue):
            break
        if layer is not None:
            found.append(here.parent)
        here = here.parent
    return found


def _layer_of(value: AffineMap, analysis: Analysis) -> fx.Node | None:
    """The layer that a link is, or that a join holds."""
    if value.link is Link.LAYER:
        return value.start
    if value.link is Link.PRODUCT and value.start is not None and analysis.product(value.start):
        return value.start if is_stored(value.start, analysis) else None
    if value.link is not Link.JOIN or value.parent is None:
        return None
    nodes = calls_between(value.parent, value.node, analysis)
    return next(iter(candidates(nodes, value, value.parent, analysis)), None)
