"""The low-rank branches of a graph, read back from its structure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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


def parameter_names(path: str, name: str, bare: bool = False) -> tuple[str, str, str]:
    """What the branch of adapter ``name`` at ``path`` calls its down, up and bias.

    Where the path is that of a ``bare`` weight, they live beside it: nothing fits below a tensor.
    """
    at = f"{path}_adapted" if bare else path
    return f"{at}.lora_A.{name}", f"{at}.lora_B.{name}", f"{at}.lora_bias.{name}"


def branches(gm: fx.GraphModule) -> list[Branch]:
    """Finds every branch, in the order of the layers that they stand beside."""
    return [branch for site in sites(gm) for branch in branches_of(site)]


def branches_of(site: Site) -> Iterator[Branch]:
    """The branches beside one call of a layer, in the order they are added."""
    base = site.node
    while (branch := _next(base, site)) is not None:
        yield branch
        base = branch.out


def last_of(site: Site) -> fx.Node:
    """The call of a layer, or the sum with the last of its branches."""
    *_, last = [site.node, *(branch.out for branch in branches_of(site))]
    return last


def _next(base: fx.Node, site: Site) -> Branch | None:
    sums = [out for out in base.users if out.target is aten.add.Tensor and out.args[0] is base]
    found = (_branch(out, base, site) for out in sums)
    return next((branch for branch in found if branch is not None), None)


def _branch(out: fx.Node, base: fx.Node, site: Site) -> Branch | None:
    delta, bias, scale = out.args[1], None, 1.0
    if (parts := _parts(delta, "add")) and _is_parameter(parts[1], site):
        delta, bias = parts
    if (parts := _parts(delta, "mul")) and isinstance(parts[1], float):
        delta, scale = parts
    expand = _parts(delta, "matmul")
    shrink = _parts(expand[0], "matmul") if expand else None
    if expand is None or shrink is None:
        return None
    up, down = expand[1], shrink[1]
    if not (_is_parameter(up, site) and _is_parameter(down, site)):
        return None
    name = str(down.target).rpartition(".")[2]
    return Branch(site.path, name, site.node, down, up, scale, bias, base, out)


def _parts(value: Any, operator: str) -> tuple[Any, Any] | None:
    if not isinstance(value, fx.Node) or op_name(value) != operator or len(value.args) != 2:
        return None
    return value.args[0], value.args[1]


def _is_parameter(value: Any, site: Site) -> bool:
    is_fetched = isinstance(value, fx.Node) and value.op == "get_attr"
    name = str(value.target).rpartition(".")[2] if is_fetched else ""
    return is_fetched and value.target in parameter_names(site.path, name, site.bare)


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
