"""Which affine regions of a graph are worth one layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from lora_fx.affine.analysis import Analysis, Opaque, Uniform
from lora_fx.affine.maps import Link, Map
from lora_fx.affine.matrices import Blocks
from lora_fx.affine.ways import LAYERS, Way, reads_more, way_in, way_out, weight_of
from lora_fx.ops import is_around, module_path

_ROUNDS = 8  # graphs of a hundred random steps settle in three


@dataclass(frozen=True)
class Region:
    """Everything between a source and one node that is an affine function of it.

    Attributes:
        value: the Map of that node.
        source: the Map that it is a function of.
        nodes: the calls in between, the last node included.
        layer: the base layer among them, whose operator, path and dtype are kept.
        before: how the source comes to what the layer reads.
        behind: how the layer's result comes to where the region's is.
        blocked: why the region stays as it is, or ``""``.
    """

    value: Map
    source: Map
    nodes: frozenset[fx.Node]
    layer: fx.Node
    before: Way
    behind: Way
    blocked: str = ""


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
    if not isinstance(value, Map) or value.node is not node or value.parent is None:
        return None
    best: Region | None = None
    for source in _sources(value, analysis, chains):
        region = _between_two(value, source, analysis, gone)
        if region is not None and (best is None or best.blocked or not region.blocked):
            best = region
    return best


def _sources(value: Map, analysis: Analysis, chains: bool) -> list[Map]:
    """How far up a region may reach: over one layer, and what its own modules do around it."""
    found: list[Map] = []
    layer: fx.Node | None = None
    glue: list[fx.Node] = []
    here = value
    while here.parent is not None:
        own = _layer_of(here, analysis)
        glue += here.glued()
        if own is not None and layer is not None and not chains:
            break
        layer = layer or own
        if layer is not None and not chains and not all(is_around(n, layer) for n in glue):
            break
        if layer is not None:
            found.append(here.parent)
        here = here.parent
    return found


def _layer_of(value: Map, analysis: Analysis) -> fx.Node | None:
    """The layer that a link is, or that a join holds."""
    if value.link is Link.LAYER:
        return value.start
    if value.link is not Link.JOIN or value.parent is None:
        return None
    nodes = _between(value.parent, value.node, analysis)
    return next(iter(_candidates(nodes, value, value.parent, analysis)), None)


def _candidates(nodes: set[fx.Node], value: Map, source: Map, analysis: Analysis) -> list[fx.Node]:
    """The layers between a source and a value of the shape of the whole, stored ones first."""
    shape = (value.size, source.size)
    layers = [n for n in sorted(nodes) if n.target in LAYERS]
    fitting = [n for n in layers if _fits(n, shape, analysis)]
    fitting += [n for n in layers if n not in fitting and _is_wider(n, value, source, analysis)]
    return sorted(fitting, key=lambda n: weight_of(n).op != "get_attr")


def _fits(node: fx.Node, shape: tuple[int, int], analysis: Analysis) -> bool:
    own = analysis.values[node]
    if node.kwargs:
        return False
    return isinstance(own, Map) and own.weight.shape == shape and not isinstance(own.weight, Blocks)


def _is_wider(node: fx.Node, value: Map, source: Map, analysis: Analysis) -> bool:
    """Whether a layer reads the source and more: the whole weight is a part of its own."""
    own = analysis.values[node]
    fits = isinstance(own, Map) and own.size == value.size and reads_more(node, source, analysis)
    return fits and not node.kwargs


def _between_two(value: Map, source: Map, analysis: Analysis, gone: set[fx.Node]) -> Region | None:
    nodes = _between(source, value.node, analysis)
    layers = _candidates(nodes, value, source, analysis)
    if (
        not layers
        or not _is_worth_it(nodes, layers[0], analysis, gone)
        or _ends_late(value, nodes, analysis)
    ):
        return None
    staying = _staying(nodes, value.node, gone)
    reason = f"{layers[0].name} is also read outside the region"
    for layer in layers:
        if layer in staying:
            continue
        before, behind = way_in(layer, source, analysis), way_out(layer, value, nodes, analysis)
        if before is not None and behind is not None:
            return Region(value, source, frozenset(nodes), layer, before, behind)
        reason = f"no reshape of the graph brings what {layer.name} reads or gives to the others"
    if value.last is Link.MOVE:
        return None  # the region that ends before the move says why
    return Region(
        value, source, frozenset(nodes), layers[0], Way(layers[0]), Way(layers[0]), reason
    )


def _is_worth_it(
    nodes: set[fx.Node], layer: fx.Node, analysis: Analysis, gone: set[fx.Node]
) -> bool:
    """Whether there is more here than one stored layer and what merely moves its features.

    A number that scales a layer is not worth a copy of a weight that others read.
    """
    values = (analysis.values[n] for n in nodes - {layer})
    lasts = {v.last for v in values if isinstance(v, Map)} - {Link.MOVE}
    if not lasts:
        return weight_of(layer).op != "get_attr"
    if lasts != {Link.GLUE} or any(map(analysis.reads_constant, nodes - {layer})):
        return True
    return not _is_read(weight_of(layer), layer, gone, analysis)


def _is_read(constant: fx.Node, layer: fx.Node, gone: set[fx.Node], analysis: Analysis) -> bool:
    """Whether any call that stays, but the layer, needs a constant or what is computed from it."""
    return any(
        user not in analysis.constants.nodes or _is_read(user, layer, gone, analysis)
        for user in constant.users
        if user is not layer and user not in gone
    )


def _ends_late(value: Map, nodes: set[fx.Node], analysis: Analysis) -> bool:
    """Whether a region ends in moves of somebody who has no other part in it."""
    moves: set[fx.Node] = set()
    node = value.node
    while (here := analysis.values.get(node)) and isinstance(here, Map) and here.last is Link.MOVE:
        moves.add(node)
        node = node.all_input_nodes[0]
    paths = {module_path(n) for n in nodes - moves}
    return bool(moves) and module_path(value.node) not in paths


def _staying(nodes: set[fx.Node], end: fx.Node, gone: set[fx.Node]) -> set[fx.Node]:
    """The calls of a region that its replacement would not save: somebody else needs them."""
    staying: set[fx.Node] = set()
    for node in sorted(nodes - {end}, reverse=True):
        outside = (user for user in node.users if user not in nodes and user not in gone)
        if any(outside) or any(user in staying for user in node.users):
            staying.add(node)
    return staying


def _between(source: Map, node: fx.Node, analysis: Analysis) -> set[fx.Node]:
    """The calls from a source to a node that carry features: no sizes, no constants."""
    found, pending = {node}, [node]
    while pending:
        here = pending.pop()
        if isinstance(analysis.values[here], Uniform):
            continue  # what it reads says its shape
        for n in here.all_input_nodes:
            known = analysis.values.get(n)
            if n is source.node or n in found or known is None or isinstance(known, Opaque):
                continue
            found.add(n)
            pending.append(n)
    return found
