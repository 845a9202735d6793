"""Which affine regions of a graph are worth one layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from lora_fx.maps import Analysis, Map
from lora_fx.ops import aten

_ROUNDS = 8  # graphs of a hundred random steps settle in three
_LAYERS = (aten.linear.default, aten.addmm.default)


@dataclass(frozen=True)
class Region:
    """Everything between a source and one node that is an affine function of it.

    Attributes:
        value: the Map of that node.
        source: the node that it is a function of.
        nodes: the calls in between, the last node included.
        layer: the base layer among them, whose operator, path and dtype are kept.
        blocked: why the region stays as it is, or ``""``.
    """

    value: Map
    source: fx.Node
    nodes: frozenset[fx.Node]
    layer: fx.Node
    blocked: str = ""

    def starts_with_layer(self, analysis: Analysis) -> bool:
        """Whether the base layer reads the source itself."""
        own = analysis.values[self.layer]
        return isinstance(own, Map) and own.parent is self.value.parent


def maximal_regions(gm: fx.GraphModule, analysis: Analysis) -> list[Region]:
    """The regions that are part of no larger one, last first.

    A region that is not blocked is taken to be replaced: what only it reads is gone, and what is
    still read from elsewhere gets a region of its own. A replacement can free an earlier region,
    so blocked ones are looked at again.
    """
    gone: set[fx.Node] = set()
    for _ in range(_ROUNDS):
        before, (found, gone) = gone, _scan(gm, analysis, gone)
        if gone == before or not any(region.blocked for region in found):
            break
    return found


def _scan(
    gm: fx.GraphModule, analysis: Analysis, earlier: set[fx.Node]
) -> tuple[list[Region], set[fx.Node]]:
    """One look at a graph of which some calls are known to go."""
    found: list[Region] = []
    gone: set[fx.Node] = set()
    kept: set[fx.Node] = set()
    known = set(earlier)
    for node in reversed(list(gm.graph.nodes)):
        if node.users and node not in kept and all(user in gone for user in node.users):
            gone.add(node)
            known.add(node)
            continue
        region = _region(node, analysis, known)
        if region is None:
            continue
        if not region.blocked:
            gone.add(node)
            known.add(node)
            kept.update((region.source, *region.layer.all_input_nodes))
        found.append(region)
    return found, gone


def _region(node: fx.Node, analysis: Analysis, gone: set[fx.Node]) -> Region | None:
    value = analysis.values.get(node)
    if not isinstance(value, Map) or value.node is not node or value.parent is None:
        return None
    source = value.parent.node
    nodes = _between(source, node, analysis)
    layers = [n for n in sorted(nodes) if n.target in _LAYERS and _fits(n, value, analysis)]
    if not layers or _is_one_layer(node, nodes, analysis):
        return None
    staying = _staying(nodes, node, gone)
    free = [layer for layer in layers if layer not in staying]
    blocked = "" if free else f"{layers[0].name} is also read outside the region"
    return Region(value, source, frozenset(nodes), (free or layers)[0], blocked)


def _staying(nodes: set[fx.Node], end: fx.Node, gone: set[fx.Node]) -> set[fx.Node]:
    """The calls of a region that its replacement would not save: somebody else needs them."""
    staying: set[fx.Node] = set()
    for node in sorted(nodes - {end}, reverse=True):
        outside = (user for user in node.users if user not in nodes and user not in gone)
        if any(outside) or any(user in staying for user in node.users):
            staying.add(node)
    return staying


def _between(source: fx.Node, node: fx.Node, analysis: Analysis) -> set[fx.Node]:
    found, pending = {node}, [node]
    while pending:
        for n in pending.pop().all_input_nodes:
            if n is not source and n not in found and n not in analysis.constants.nodes:
                found.add(n)
                pending.append(n)
    return found


def _fits(node: fx.Node, value: Map, analysis: Analysis) -> bool:
    own = analysis.values.get(node)
    return isinstance(own, Map) and own.weight.shape == value.weight.shape


def _is_one_layer(node: fx.Node, nodes: set[fx.Node], analysis: Analysis) -> bool:
    """Whether nothing but one layer with stored weights computes here."""
    if any(_computes(n, analysis) for n in nodes - {node}):
        return False
    constants = [n for n in node.all_input_nodes if n in analysis.constants.nodes]
    return node.target in _LAYERS and all(n.op == "get_attr" for n in constants)


def _computes(node: fx.Node, analysis: Analysis) -> bool:
    value = analysis.values.get(node)
    return isinstance(value, Map) and value.node is node
