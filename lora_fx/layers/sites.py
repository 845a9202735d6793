"""Where an adapter can act: the layers of a graph in normal form, by module path."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import fx

from lora_fx.graph.lazy_tensor import LazyTensor, get_unevaluated
from lora_fx.graph.ops import call_argument, holder_path, reached
from lora_fx.layers.layer import Layer
from lora_fx.layers.layer_types import OPERATORS, TYPES, operands_of
from lora_fx.layers.matrix_products import (
    Labels,
    Place,
    argument_at,
    batches_of,
    has_factors,
    product_of,
)
from lora_fx.layers.parametrized_weights import makers, recorded
from lora_fx.layers.site_names import is_packed, paths_of
from lora_fx.layers.weight_parts import Part, Places, Read, part_of

_CALLS = ("call_function", "call_method")
CLOSED = (
    "lies in a module that symbolic tracing keeps whole, where nothing can be adapted: trace the "
    "model with example inputs, which opens it"
)


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
        return cast(fx.Node, argument_at(self.node, self.at[0]))

    @property
    def operand(self) -> fx.Node:
        """What the call reads for its weight, W, rows of it, or what an adapter made of it."""
        return cast(fx.Node, argument_at(self.node, self.at[1]))

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


def sites(gm: fx.GraphModule) -> list[Site]:
    """The layers of a graph that an output hangs on, in order, by the paths of `paths_of`."""
    bases = recorded(gm.graph)
    made = makers(bases)
    own = (node for node in reached(gm.graph) if node not in made)
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
        groups = 1 if at.groups is None else int(call_argument(node, at.groups, "groups", 1))
    else:
        return None
    if part is None or is_factor(str(part.source.target)):
        return None
    tensor = get_unevaluated(gm, str(part.source.target))
    if product is not None:
        layer = TYPES["linear" if product.turned != part.turned else "linear_transposed"]
        part = part.behind(product.matrix, batches_of(product))
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


def is_factor(target: str) -> bool:
    """Whether a tensor is one that an injected adapter brought: `branches.parameter_names`."""
    *_, holder, name = ("", *target.split("."))
    return holder in ("lora_A", "lora_B") or name.startswith(("lora_shrink", "lora_expand"))


def is_bare(path: str, weight: str) -> bool:
    """Whether a layer is called as its weight is, which no module of its own holds."""
    leaf = path.rpartition(".")[2]
    return path == weight or (leaf == weight.rpartition(".")[2] and leaf != "weight")


def by_path(gm: fx.GraphModule) -> dict[str, list[Site]]:
    """The sites of a graph, grouped by path: more than one where a layer is called again."""
    groups: dict[str, list[Site]] = defaultdict(list)
    for site in sites(gm):
        groups[site.path].append(site)
    return dict(groups)


def readers(gm: fx.GraphModule, parameter: str) -> Iterator[Read]:
    """Who reads ``<module path>.<name>``: pairs of a call and the ``get_attr`` node it reads.

    Told by the module that made the call, since a tied parameter bears another module's name;
    where none of its calls does, by the layer that the graph has at that path, or the table of
    that name, else by the name: a module that is not called lends its weight.
    """
    path, _, name = parameter.rpartition(".")
    own = [n for n in gm.graph.nodes if n.op in _CALLS and holder_path(n) == path]
    found = _reads(own, name) or _reads(_calls_of_layers(gm, parameter), name)
    if found:
        return iter(found)
    lent = [n for n in gm.graph.find_nodes(op="get_attr") if n.target == parameter]
    return ((user, node) for node in lent for user in node.users if user.op in _CALLS)


def _calls_of_layers(gm: fx.GraphModule, parameter: str) -> list[fx.Node]:
    """The calls of the layers at the path of a parameter, or of those that look it up."""
    layers, path = sites(gm), parameter.rpartition(".")[0]
    of_name = [s for s in layers if s.path == path]
    found = of_name or [s for s in layers if _is_table(s, parameter)]
    return list(dict.fromkeys(call for site in found for call in _calls(gm, site)))


def _reads(calls: Sequence[fx.Node], name: str) -> list[Read]:
    """Which of the calls read a tensor whose own name is this."""
    return [
        (node, source)
        for node in calls
        for source in node.all_input_nodes
        if source.op == "get_attr" and str(source.target).rpartition(".")[2] == name
    ]


def tensor_of(gm: fx.GraphModule, parameter: str) -> torch.Tensor | LazyTensor | None:
    """The tensor that a graph has for ``<module path>.<name>``; None if nothing reads one."""
    read = next(readers(gm, parameter), None)
    if read is not None:
        return cast(torch.Tensor, get_unevaluated(gm, str(read[1].target)))
    if not is_inside(gm, parameter):
        return None
    try:
        found = get_unevaluated(gm, parameter)
    except AttributeError:
        return None
    return found if isinstance(found, torch.Tensor) else None


def is_inside(gm: fx.GraphModule, parameter: str) -> bool:
    """Whether a tensor would be of a module that is called whole, as symbolic traces keep norms.

    No node fetches such a tensor: the module in the graph holds it.
    """
    called = (str(node.target) for node in gm.graph.nodes if node.op == "call_module")
    return any(parameter.startswith(f"{path}.") for path in called)


def _calls(gm: fx.GraphModule, site: Site) -> tuple[fx.Node, ...]:
    """A layer's call, and what picks its weight and bias."""
    bias = part_of(gm, site.bias)
    return *site.part.calls, *(bias.calls if bias else ()), site.node


def _is_table(site: Site, parameter: str) -> bool:
    return site.type.reads_ids and site.is_whole and site.weight.target == parameter
