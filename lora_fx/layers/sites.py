"""Where an adapter can act: the layers of a graph in normal form, by module path."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import getitem
from typing import Any, cast

import torch
from torch import fx

from lora_fx.choices import takes
from lora_fx.errors import PassError
from lora_fx.graph.constants import Constants
from lora_fx.graph.lazy_tensor import evaluate, get_unevaluated
from lora_fx.graph.ops import call_argument, holder_path, needed, reached
from lora_fx.graph.wrappers import PEFT_LAYER, PEFT_MODEL
from lora_fx.layers.adapter_tensors import is_factor, makers, recorded
from lora_fx.layers.layer import Layer
from lora_fx.layers.layer_types import OPERATORS, TYPES, operands_of
from lora_fx.layers.matrix_products import (
    Labels,
    Place,
    has_factors,
    product_of,
)
from lora_fx.layers.weight_parts import Part, Places, Read, part_of

# Of nn.MultiheadAttention, which calls a layer of its own on each of them.
PACKED = "in_proj_weight"  # query, key and value in one
_APART = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_INNER = ".out_proj"
# With the number that a new weight has while the old one is read elsewhere.
_PACKED = re.compile(rf"\.{PACKED}(_\d+)?$")
_NUMBERED = re.compile(r"weight_\d+$")
# What torch calls a parameter that others are computed from: it is known as what is computed.
_PARAMETRIZED = re.compile(r"\bparametrizations\.(\w+)\.original$")


@dataclass(frozen=True, kw_only=True)
class Site(Layer):
    """One call of a layer.

    Attributes:
        node: the call: ``linear(x, W, b)``, or ``addmm(b, x, W)`` for a transposed weight, any
            other `Product`, ``embedding(W, ids)``, ``conv2d(x, W, b, ...)``. Several calls may be
            of one path.
        weight: the ``get_attr`` node of W.
        bias: the node of b, (out,), or None.
        part: what the call reads of W.
        at: where the call has x, and where its weight.
        labels: where a product has its features; None for the last axis.
    """

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    part: Part
    at: tuple[Place, Place]
    labels: Labels | None = None

    @property
    def input(self) -> fx.Node:
        """The node of x, (..., in), as the graph has it now."""
        return self._argument(self.at[0])

    @property
    def operand(self) -> fx.Node:
        """What the call reads for its weight, W, rows of it, or what an adapter made of it."""
        return self._argument(self.at[1])

    @property
    def outputs(self) -> Places | None:
        """The outputs of W that the call computes, where these are not all."""
        return self.part.columns if self.transposed else self.part.rows

    @property
    def inputs(self) -> Places | None:
        """The inputs of W that the call reads, where these are not all."""
        return self.part.rows if self.transposed else self.part.columns

    @property
    def is_whole(self) -> bool:
        """Whether the call reads all of W."""
        return self.part.rows is None and self.part.columns is None

    @property
    def has_first(self) -> bool:
        """Whether the first input of W is read; where calls sum up parts, that one has the bias."""
        return self.inputs is None or 0 in self.inputs

    @property
    def reads(self) -> tuple[Read, ...]:
        """Who reads W for the call, or what an adapter made of it, and the node that it reads."""
        return self.part.reads or ((self.node, self.operand),)

    @property
    def bare(self) -> bool:
        """Whether the weight is a parameter that no module of its own holds."""
        return is_bare(self.path, str(self.weight.target))

    @property
    def layer(self) -> Layer:
        """The layer without the nodes of a graph."""
        return Layer(
            path=self.path, kind=self.kind, shape=self.shape, dtype=self.dtype,
            groups=self.groups, name=self.kind,
        )  # fmt: skip

    @property
    def spelled(self) -> bool:
        """Whether it is written out as a product, and no call of a layer's own function."""
        return self.is_linear and self.node.target not in OPERATORS

    @property
    def packed(self) -> bool:
        """Whether it is the projection of an attention module that packs three in one."""
        return is_packed(str(self.weight.target))

    def _argument(self, place: Place) -> fx.Node:
        arguments: Any = self.node.args
        return cast(fx.Node, reduce(getitem, place, arguments))


Groups = Mapping[str, Sequence[Site]]  # path of a layer -> its calls, as `by_path` finds them


@takes(PassError)
def sites(gm: fx.GraphModule) -> list[Site]:
    """The layers of a graph that an output hangs on, in order, by the paths of `paths_of`."""
    bases = recorded(gm.graph)
    made = makers(bases)
    own = [n for n in reached(gm.graph) if n.op == "call_function" and n not in made]
    found = [site for node in own if (site := _site(gm, node, bases))]
    paths = paths_of((site.path, str(site.weight.target)) for site in found)
    return [replace(site, path=paths[site.path, str(site.weight.target)]) for site in found]


def _site(gm: fx.GraphModule, node: fx.Node, bases: Mapping[fx.Node, fx.Node]) -> Site | None:
    product = product_of(node)
    if product is not None:
        part, groups = part_of(gm, product.matrix, bases), 1
        bias, labels, places = product.bias, product.labels, product.at
    elif node.target in OPERATORS and not has_factors(node):
        at = operands_of(node.target)
        part, labels = part_of(gm, node.args[at.weight], bases), None
        places = (at.x,), (at.weight,)
        bias = None if at.bias is None else call_argument(node, at.bias, "bias")
        groups = 1 if at.groups is None else call_argument(node, at.groups, "groups", 1)
    else:
        return None
    if part is None or is_factor(str(part.source.target)) or isinstance(groups, fx.Node):
        return None  # as many groups as rows: the weight of each is made of its style
    tensor = get_unevaluated(gm, str(part.source.target))
    if product is not None:
        layer = TYPES["linear" if product.turned != part.turned else "linear_transposed"]
        part = part.behind(product.matrix, product.batches)
    elif part.turned or (groups > 1 and part.calls):
        return None
    else:
        layer = OPERATORS[node.target]
    if len(tensor.shape) != 2 + layer.kernel:
        return None  # a vector: nothing with an input and an output side
    out, into, *kernel = layer.canonical_shape(tuple(tensor.shape), groups)
    return Site(
        path=holder_path(node),
        kind=layer.name,
        shape=(out, into * groups, *kernel),
        dtype=tensor.dtype,
        groups=groups,
        node=node,
        weight=part.source,
        bias=bias,
        part=part,
        at=places,
        labels=labels,
    )


def is_bare(path: str, weight: str) -> bool:
    """Whether a layer is called as its weight is, which no module of its own holds."""
    leaf = path.rpartition(".")[2]
    return path == weight or (leaf == weight.rpartition(".")[2] and leaf != "weight")


def weight_name(site: Site) -> str:
    """What the weight of a layer is called by the layer's own path."""
    leaf = str(site.weight.target).rpartition(".")[2]
    return site.path if site.bare else f"{site.path}.{leaf}"


def by_path(gm: fx.GraphModule) -> dict[str, list[Site]]:
    """The sites of a graph, grouped by path: more than one where a layer is called again."""
    groups: dict[str, list[Site]] = defaultdict(list)
    for site in sites(gm):
        groups[site.path].append(site)
    return dict(groups)


def is_one_way(calls: Sequence[Site]) -> bool:
    """Whether all calls of a layer read its weight on the same side."""
    return len({site.transposed for site in calls}) == 1


def is_packed(name: str) -> bool:
    """Whether a weight is the projection of an attention module that packs three in one."""
    return bool(_PACKED.search(name))


def paths_of(calls: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Names layers by the calls of a graph.

    A module that owns several weights (an attention module) has a layer for each, told apart by
    the weight's own name; the packed projection is called as the module is, and what belongs to a
    module further down is called as that is, whoever calls it. Layers of a model that PEFT has
    wrapped are called as its adapters call them.

    Args:
        calls: the path of the module that calls, and the name of the weight, each.

    Returns:
        Each of these -> the path of the layer.
    """
    weights: dict[str, set[str]] = defaultdict(set)
    for path, name in calls:
        weights[path].add(name)
    alone = {path for path, names in weights.items() if path and len(names) == 1}
    found = {
        (path, name): _path(path, name, names, alone)
        for path, names in weights.items()
        for name in names
    }
    inner = {path: _unwrapped(path) for path in found.values()}
    is_wrapped = any(path.endswith(PEFT_LAYER) for path in inner)
    are_apart = len(set(inner.values())) == len(inner)
    return {c: inner[path] for c, path in found.items()} if is_wrapped and are_apart else found


def _unwrapped(path: str) -> str:
    inner = path.removeprefix(PEFT_MODEL)
    return path if inner == path else inner.removesuffix(PEFT_LAYER)


def _path(path: str, name: str, names: set[str], alone: set[str]) -> str:
    name = _PARAMETRIZED.sub(r"\1", name)
    holder, _, leaf = name.rpartition(".")
    if path and not name.startswith(f"{path}."):  # a tied weight bears another module's name
        attends = any(other.rpartition(".")[2] in (PACKED, *_APART) for other in names)
        if attends and holder.endswith(_INNER):
            return path + _INNER
        is_own = path in alone and leaf.startswith("weight")
        return path if is_own or leaf == PACKED else f"{path}.{leaf}"
    if is_packed(name):
        return holder
    is_inner = leaf == "weight" or _NUMBERED.match(leaf)
    if path in alone and leaf.startswith("weight") and (holder == path or not is_inner):
        return path
    siblings = [other for other in names if other.rpartition(".")[0] == holder]
    if _NUMBERED.match(leaf) and holder != path and len(siblings) == 1:
        return holder
    owner = name.removesuffix(".weight")
    return name if owner in alone else owner


def bias_of(gm: fx.GraphModule, calls: Sequence[Site]) -> torch.Tensor | None:
    """The bias of all outputs, (out,), from the calls of a layer: a part of one may be each call's.

    Returns:
        None if no call has a bias that is known before the graph runs.
    """
    known = {site.node: value for site in calls if (value := _value(gm, site.bias)) is not None}
    if not known:
        return None
    first = next(iter(known.values()))
    if len(first) == calls[0].out_features and all(site.is_whole for site in calls):
        return first
    total = first.new_zeros(calls[0].out_features)
    added = set()
    # Calls that sum up parts of the inputs: the one with the first input comes before the others.
    for site in sorted(calls, key=lambda site: not site.has_first):
        if site.node not in known or site.part[1:3] in added:
            continue
        places = slice(None) if site.outputs is None else list(site.outputs)
        if site.has_first:
            total[places] = known[site.node]
        else:
            added.add(site.part[1:3])
            total[places] += known[site.node]
    return total


def _value(gm: fx.GraphModule, node: fx.Node | None) -> torch.Tensor | None:
    if node is None:
        return None
    if node.op == "get_attr":
        return evaluate(get_unevaluated(gm, str(node.target)))
    constants = Constants(gm)
    if not all(constants.admit(step) for step in needed(node)):
        return None
    value = constants.value(node).to(constants.dtype(node))
    return value if isinstance(value, torch.Tensor) and value.ndim == 1 else None
