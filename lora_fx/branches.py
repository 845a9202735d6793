"""The low-rank branches of a graph, read back from its structure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from lora_fx.adapter import Adapter, Update
from lora_fx.errors import AdapterError, shorten
from lora_fx.graphs import attribute
from lora_fx.ops import aten, op_name
from lora_fx.sites import Site, sites


@dataclass(frozen=True)
class Branch:
    """``out = base + scale * ((x @ down) @ up) [+ bias]``, beside one call of a layer.

    Attributes:
        path: module path of the layer.
        name: the adapter's name.
        site: the layer's own call.
        down: ``get_attr`` node of (in, r).
        up: ``get_attr`` node of (r, out).
        scale: the factor that is not folded into ``up``; 1 when it is.
        bias: ``get_attr`` node of (out,), or None.
        base: what the branch is added to: the site, or the sum with an earlier branch.
        out: the sum.
    """

    path: str
    name: str
    site: fx.Node
    down: fx.Node
    up: fx.Node
    scale: float
    bias: fx.Node | None
    base: fx.Node
    out: fx.Node


def parameter_names(path: str, name: str) -> tuple[str, str, str]:
    """What the branch of adapter ``name`` at ``path`` calls its down, up and bias."""
    return f"{path}.lora_A.{name}", f"{path}.lora_B.{name}", f"{path}.lora_bias.{name}"


def branches(gm: fx.GraphModule) -> list[Branch]:
    """Finds every branch, in the order of the layers that they stand beside."""
    return [branch for site in sites(gm) for branch in _chain(site.node, site.path)]


def last_of(site: Site) -> fx.Node:
    """The call of a layer, or the sum with the last of its branches."""
    return next((branch.out for branch in reversed(list(_chain(site.node, site.path)))), site.node)


def _chain(site: fx.Node, path: str) -> Iterator[Branch]:
    base = site
    while (branch := _next(base, site, path)) is not None:
        yield branch
        base = branch.out


def _next(base: fx.Node, site: fx.Node, path: str) -> Branch | None:
    for out in base.users:
        if out.target is aten.add.Tensor and out.args[0] is base:
            branch = _branch(out, base, site, path)
            if branch is not None:
                return branch
    return None


def _branch(out: fx.Node, base: fx.Node, site: fx.Node, path: str) -> Branch | None:
    delta, bias, scale = out.args[1], None, 1.0
    if _is(delta, "add") and _parameter(delta.args[1], path):
        delta, bias = delta.args
    if _is(delta, "mul") and isinstance(delta.args[1], float):
        delta, scale = delta.args
    if not _is(delta, "matmul") or not _is(delta.args[0], "matmul"):
        return None
    up, down = delta.args[1], delta.args[0].args[1]
    if not (_parameter(up, path) and _parameter(down, path)):
        return None
    name = str(down.target).rpartition(".")[2]
    return Branch(path, name, site, down, up, scale, bias, base, out)


def _is(value: object, operator: str) -> bool:
    return isinstance(value, fx.Node) and op_name(value) == operator


def _parameter(value: object, path: str) -> bool:
    prefix = f"{path}.lora_"
    return isinstance(value, fx.Node) and value.op == "get_attr" and prefix in str(value.target)


def adapter_from(gm: fx.GraphModule, name: str | None = None) -> Adapter:
    """Reads an injected adapter back, with the values it has now.

    Args:
        gm: a graph with branches, such as one that was trained after `inject`.
        name: which adapter; may be left out when there is one.

    Raises:
        AdapterError: there is no such adapter, or several and no name.
    """
    found = branches(gm)
    names = list(dict.fromkeys(branch.name for branch in found))
    if not names or (name or names[0]) not in names or (name is None and len(names) > 1):
        listed = shorten(names) or "none"
        raise AdapterError(f"adapter {name!r}: the graph holds {listed}; name one of those")
    chosen = [branch for branch in found if branch.name == (name or names[0])]
    return Adapter(name or names[0], {b.path: _update(gm, b) for b in chosen})


def _update(gm: fx.GraphModule, branch: Branch) -> Update:
    def read(node: fx.Node) -> torch.Tensor:
        tensor: torch.Tensor = attribute(gm, str(node.target))
        return tensor.detach().clone()

    down, up = read(branch.down).T.contiguous(), read(branch.up).T.contiguous()
    bias = None if branch.bias is None else read(branch.bias) / branch.scale
    return Update(down, up, branch.scale, bias=bias)
