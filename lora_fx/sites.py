"""Where an adapter can act: the layers of a graph in normal form, by module path."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import fx

from lora_fx.deferred import raw
from lora_fx.ops import aten, call_argument, module_path


@dataclass(frozen=True)
class Site:
    """One call of a linear layer.

    Attributes:
        node: the call: ``linear(x, W, b)``, or ``addmm(b, x, W)`` for a transposed weight.
        path: path of the module that made the call; one path may have several calls.
        weight: the ``get_attr`` node of W: (out, in), or (in, out) if transposed.
        bias: the node of b, (out,), or None.
        transposed: whether W is stored as (in, out), as transformers' Conv1D does.
        in_features: size of the last axis of x.
        out_features: size of the last axis of the result.
        dtype: of W.
    """

    node: fx.Node
    path: str
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool
    in_features: int
    out_features: int
    dtype: torch.dtype

    @property
    def input(self) -> fx.Node:
        """The node of x, (..., in), as the graph has it now."""
        x = self.node.args[1 if self.transposed else 0]
        return cast(fx.Node, x)

    @property
    def bare(self) -> bool:
        """Whether the weight is a parameter that no module of its own holds."""
        return self.path == self.weight.target

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), whatever way the weight is stored."""
        return self.out_features, self.in_features


def sites(gm: fx.GraphModule) -> list[Site]:
    """The linear layers of a graph, in order.

    A module that owns several weights (a packed attention) has a site for each, told apart by
    the weight's own name.
    """
    found = [site for node in gm.graph.nodes if (site := _site(gm, node))]
    weights: dict[str, set[str]] = defaultdict(set)
    for site in found:
        weights[site.path].add(str(site.weight.target))
    modules = {path for path, names in weights.items() if path and len(names) == 1}
    return [s if s.path in modules else _by_weight(s, modules) for s in found]


def _site(gm: fx.GraphModule, node: fx.Node) -> Site | None:
    parts = _parts(node)
    if parts is None:
        return None
    weight, bias = parts
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    tensor = raw(gm, str(weight.target))
    if len(tensor.shape) != 2:
        return None  # a vector: nothing with an input and an output side
    transposed = node.target is aten.addmm.default
    rows, columns = tensor.shape[::-1] if transposed else tensor.shape
    path = module_path(node)
    return Site(node, path, weight, bias, transposed, columns, rows, tensor.dtype)


def _parts(node: fx.Node) -> tuple[Any, Any] | None:
    if node.target is aten.linear.default:
        return node.args[1], call_argument(node, 2, "bias")
    if node.target is aten.addmm.default and not node.kwargs and len(node.args) == 3:
        return node.args[2], node.args[0]
    return None


def _by_weight(site: Site, modules: set[str]) -> Site:
    name = str(site.weight.target)
    owner = name.removesuffix(".weight")
    if site.path and not name.startswith(f"{site.path}."):
        return replace(site, path=f"{site.path}.{name.rpartition('.')[2]}")
    return replace(site, path=name if owner in modules else owner)


def by_path(gm: fx.GraphModule) -> dict[str, list[Site]]:
    """The sites of a graph, grouped by path: more than one where a layer is called again."""
    groups: dict[str, list[Site]] = defaultdict(list)
    for site in sites(gm):
        groups[site.path].append(site)
    return dict(groups)


def readers(gm: fx.GraphModule, parameter: str) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Who reads ``<module path>.<name>``: pairs of a call and the ``get_attr`` node it reads.

    Told by the module that made the call, since a tied parameter bears another module's name.
    """
    path, _, name = parameter.rpartition(".")
    for node in gm.graph.nodes:
        if node.op != "call_function" or module_path(node) != path:
            continue
        for source in node.all_input_nodes:
            if source.op == "get_attr" and str(source.target).rpartition(".")[2] == name:
                yield node, source
