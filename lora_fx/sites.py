"""Where an adapter can act: the layers of a graph in normal form, by module path."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import fx

from lora_fx.deferred import raw
from lora_fx.layer import Layer
from lora_fx.ops import aten, call_argument, module_path
from lora_fx.products import Labels, product_of
from lora_fx.recorded import recorded
from lora_fx.row_blocks import Block, block_of
from lora_fx.turned import turned_from

# The operator of a layer that is no product with one matrix: its kind, and where it reads its
# input, its weight and its bias.
_OPERATORS: dict[Any, tuple[str, int, int, int | None]] = {
    aten.embedding.default: ("embedding", 1, 0, None),
    aten.conv1d.default: ("conv1d", 0, 1, 2),
    aten.conv2d.default: ("conv2d", 0, 1, 2),
    aten.conv3d.default: ("conv3d", 0, 1, 2),
    aten.conv1d.padding: ("conv1d", 0, 1, 2),
    aten.conv2d.padding: ("conv2d", 0, 1, 2),
    aten.conv3d.padding: ("conv3d", 0, 1, 2),
}
_CALLED = {aten.linear.default, aten.addmm.default}
PACKED = ".in_proj_weight"  # of nn.MultiheadAttention: query, key and value in one


@dataclass(frozen=True, kw_only=True)
class Site(Layer):
    """One call of a layer.

    Attributes:
        node: the call: ``linear(x, W, b)``, or ``addmm(b, x, W)`` for a transposed weight, any
            other `Product`, ``embedding(W, ids)``, ``conv2d(x, W, b, ...)``. Several calls may be
            of one path.
        weight: the ``get_attr`` node of W.
        bias: the node of b, (out,), or None.
        rows: the outputs that this call computes, where it reads a part of W.
        labels: where a product has its features; None for the last axis.
    """

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    rows: Block | None = None
    labels: Labels | None = None

    @property
    def input(self) -> fx.Node:
        """The node of x, (..., in), as the graph has it now."""
        product = product_of(self.node)
        place = 0 if product else _OPERATORS[self.node.target][1]
        return product.x if product else cast(fx.Node, self.node.args[place])

    @property
    def operand(self) -> fx.Node:
        """What the call reads as its weight: W, rows of it, or what an adapter made of it."""
        product = product_of(self.node)
        place = 0 if product else _OPERATORS[self.node.target][2]
        return product.operand if product else cast(fx.Node, self.node.args[place])

    @property
    def bare(self) -> bool:
        """Whether the weight is a parameter that no module of its own holds."""
        name = self.path.rpartition(".")[2]
        is_named = name == _leaf(self.weight) and name != "weight"
        return is_named or self.path == self.weight.target

    @property
    def spelled(self) -> bool:
        """Whether it is written out as a product, and no call of a layer's own function."""
        return self.is_linear and self.node.target not in _CALLED

    @property
    def packed(self) -> bool:
        """Whether it is the projection of an attention module that packs three in one."""
        return str(self.weight.target).endswith(PACKED)


def sites(gm: fx.GraphModule) -> list[Site]:
    """The layers of a graph, in order.

    A module that owns several weights (an attention module) has a site for each, told apart by
    the weight's own name; the packed projection is called as the module is.
    """
    bases = recorded(gm.graph)
    found = [site for node in gm.graph.nodes if (site := _site(gm, node, bases))]
    weights: dict[str, set[str]] = defaultdict(set)
    for site in found:
        weights[site.path].add(str(site.weight.target))
    modules = {path for path, names in weights.items() if path and len(names) == 1}
    return [s if _is_of_module(s, modules) else _by_weight(s, modules) for s in found]


def _is_of_module(site: Site, modules: set[str]) -> bool:
    """Whether a layer is called as the module that makes the call, which has no other weight."""
    return site.path in modules and not site.packed and _leaf(site.weight).startswith("weight")


def _site(gm: fx.GraphModule, node: fx.Node, bases: Mapping[fx.Node, fx.Node]) -> Site | None:
    product = product_of(node)
    if product is not None:
        source, turns = turned_from(product.matrix, bases)
        weight, rows = block_of(source, bases)
        kind = "linear" if product.turned != turns else "linear_transposed"
        bias, labels = product.bias, product.labels
        if rows is not None and kind != "linear":
            return None  # parts of what is summed
    elif node.target in _OPERATORS:
        kind, _, place, at = _OPERATORS[node.target]
        weight, rows = block_of(node.args[place], bases)
        bias, labels = None if at is None else call_argument(node, at, "bias"), None
    else:
        return None
    if weight is None or is_factor(str(weight.target)):
        return None
    tensor = raw(gm, str(weight.target))
    axes = 2 if not kind.startswith("conv") else 2 + int(kind[4])
    if len(tensor.shape) != axes:
        return None  # a vector: nothing with an input and an output side
    groups = int(call_argument(node, 6, "groups", 1)) if kind.startswith("conv") else 1
    out, into, *kernel = tensor.shape
    if kind in ("linear_transposed", "embedding"):
        out, into = into, out
    return Site(
        path=module_path(node),
        kind=kind,
        shape=(out, into * groups, *kernel),
        dtype=tensor.dtype,
        groups=groups,
        node=node,
        weight=weight,
        bias=bias,
        rows=rows,
        labels=labels,
    )


def is_factor(target: str) -> bool:
    """Whether a tensor is one that an injected adapter brought: `branches.parameter_names`."""
    *_, holder, name = ("", *target.split("."))
    return holder in ("lora_A", "lora_B") or name.startswith(("lora_shrink", "lora_expand"))


def _leaf(weight: fx.Node) -> str:
    return str(weight.target).rpartition(".")[2]


def _by_weight(site: Site, modules: set[str]) -> Site:
    name = str(site.weight.target)
    owner = name.removesuffix(".weight").removesuffix(PACKED)
    if site.path and not name.startswith(f"{site.path}."):
        return replace(site, path=f"{site.path}.{name.rpartition('.')[2]}")
    return replace(site, path=name if owner in modules and not site.packed else owner)


def by_path(gm: fx.GraphModule) -> dict[str, list[Site]]:
    """The sites of a graph, grouped by path: more than one where a layer is called again."""
    groups: dict[str, list[Site]] = defaultdict(list)
    for site in sites(gm):
        groups[site.path].append(site)
    return dict(groups)


def readers(gm: fx.GraphModule, parameter: str) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Who reads ``<module path>.<name>``: pairs of a call and the ``get_attr`` node it reads.

    Told by the module that made the call, since a tied parameter bears another module's name;
    where none did, by the layer that the graph has at that path, or the table of that name.
    """
    path, _, name = parameter.rpartition(".")
    calls = [n for n in gm.graph.nodes if n.op == "call_function" and module_path(n) == path]
    if not calls:
        layers = [site for site in sites(gm) if site.rows is None]
        of_name = [s.node for s in layers if s.path == path]
        calls = of_name or [s.node for s in layers if _is_table(s, parameter)]
    for node in calls:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and str(source.target).rpartition(".")[2] == name:
                yield node, source


def _is_table(site: Site, parameter: str) -> bool:
    return site.kind == "embedding" and site.weight.target == parameter
