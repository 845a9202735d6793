"""Abstract interpretation: which nodes are affine functions of which.

Each node gets one value. A constant is computable from constants alone. A `Map` is an affine
function of its parent, which is a Map itself, and so on up to the source: the chain holds the
points that every path from the source runs through. Anything else is opaque, for a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from lora_fx.constants import Constants
from lora_fx.ops import op_name
from lora_fx.weights import Identity, Matrix, RowScaled, product, total
from lora_fx.written import written


@dataclass(frozen=True, eq=False)
class Map:
    """``node = weight @ parent + bias`` on the last axis.

    Attributes:
        node: whose value this is.
        parent: the Map of the node that it is a function of; None for a source.
        weight: (out, in).
        bias: (out, 1), or None for zero.
        depth: how many links away the source is.
        dtype: of the node; None for a source, which may be of any.
    """

    node: fx.Node
    parent: Map | None
    weight: Matrix
    bias: Matrix | None = None
    depth: int = 0
    dtype: torch.dtype | None = None

    @property
    def size(self) -> int:
        """Features of the node."""
        return self.weight.shape[0]

    def then(
        self, node: fx.Node, dtype: torch.dtype, weight: Matrix, bias: Matrix | None = None
    ) -> Map:
        """A node that is an affine function of this one."""
        return Map(node, self, weight, bias, self.depth + 1, dtype)

    def scaled(self, node: fx.Node, factor: Matrix) -> Map:
        """A node that is ``diag(factor)`` times this one: part of the link, not a link more."""
        bias = self.bias and RowScaled(factor, self.bias)
        return replace(self, node=node, weight=RowScaled(factor, self.weight), bias=bias)

    def shifted(self, node: fx.Node, shift: Matrix) -> Map:
        """A node that is this one plus a constant: part of the link as well."""
        return replace(self, node=node, bias=total(self.bias, shift))

    def since(self, ancestor: Map) -> tuple[Matrix, Matrix | None]:
        """Weight and bias of this node as a function of one further up its chain."""
        weight: Matrix = Identity(self.size)
        bias: Matrix | None = None
        here = self
        while here is not ancestor and here.parent is not None:
            if here.bias is not None:
                bias = total(bias, product(weight, here.bias))
            weight = product(weight, here.weight)
            here = here.parent
        return weight, bias


def meet(one: Map, other: Map) -> Map | None:
    """The nearest Map that both are functions of, or None if their sources differ."""
    while one is not other:
        if one.depth < other.depth:
            one, other = other, one
        if one.parent is None:
            return None
        one = one.parent
    return one


@dataclass(frozen=True)
class Same:
    """A node that passes on one that is no Map itself."""

    node: fx.Node


@dataclass(frozen=True)
class Opaque:
    """Not affine, and why."""

    reason: str


Value = Map | Same | Opaque
# Their rules read arguments by place; what they can be told by keyword changes what they compute.
_BY_PLACE = {"addmm", "matmul", "mm", "add", "sub", "mul", "div", "truediv", "neg"}
Rule = Callable[["Analysis", fx.Node], Value]


class Analysis:
    """The values of every node of a graph, which is read and not run.

    Args:
        gm: a graph in normal form.
        rules: operator name -> its transfer function.

    Attributes:
        constants: the nodes that are computable from constants.
        values: what every other node is.
    """

    def __init__(self, gm: fx.GraphModule, rules: Mapping[str, Rule]) -> None:
        self.gm = gm
        self.constants = Constants(gm)
        self.values: dict[fx.Node, Value] = {}
        self._sources: dict[fx.Node, Map] = {}
        self._written = written(gm.graph)
        for node in gm.graph.nodes:
            if node in self._written:
                self.values[node] = Opaque("is written in place")
            elif node.op not in ("placeholder", "output") and not self.constants.admit(node):
                self.values[node] = self._value(node, rules)

    def _value(self, node: fx.Node, rules: Mapping[str, Rule]) -> Value:
        name = op_name(node)
        if name not in rules:
            return Opaque(f"{name} is not known to be affine")
        if not node.args or (node.kwargs and name in _BY_PLACE):
            return Opaque(f"{name} is called by keywords")
        return rules[name](self, node)

    def map_of(self, value: object) -> Map | None:
        """The Map of an argument: its own, or that of the source it has become."""
        if not isinstance(value, fx.Node):
            return None
        known = self.values.get(value)
        if isinstance(known, Same):
            return self.map_of(known.node)
        return known if isinstance(known, Map) else self._sources.get(value)

    def source(self, value: object, size: int) -> Map | None:
        """The Map of an argument with ``size`` features, which becomes a source if it is none."""
        if not isinstance(value, fx.Node) or value in self.constants.nodes:
            return None
        known = self.values.get(value)
        if isinstance(known, Same):
            return self.source(known.node, size)
        if isinstance(known, Map) or value in self._written:
            return known if isinstance(known, Map) else None
        return self._sources.setdefault(value, Map(value, None, Identity(size)))
