"""Which affine regions of a graph are worth one layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from lora_fx.maps import Analysis, Map
from lora_fx.ops import aten

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


def maximal_regions(gm: fx.GraphModule, analysis: Analysis) -> Iterator[Region]:
    """The regions that are part of no larger one, last first."""
    covered: set[fx.Node] = set()
    for node in reversed(list(gm.graph.nodes)):
        inside = node in covered and all(user in covered for user in node.users)
        region = None if inside else _region(node, analysis)
        if region is None:
            continue
        if not region.blocked:
            covered |= region.nodes
        yield region


def _region(node: fx.Node, analysis: Analysis) -> Region | None:
    value = analysis.values.get(node)
    if not isinstance(value, Map) or value.node is not node or value.parent is None:
        return None
    source = value.parent.node
    nodes = _between(source, node, analysis)
    layers = [n for n in nodes if n.target in _LAYERS and _fits(n, value, analysis)]
    if not layers or _is_one_layer(node, nodes, analysis):
        return None
    layer = min(layers)
    read_outside = layer is not node and any(user not in nodes for user in layer.users)
    blocked = f"{layer.name} is also read outside the region" if read_outside else ""
    return Region(value, source, frozenset(nodes), layer, blocked)


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
