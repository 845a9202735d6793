"""Matches low-rank branches in a graph: their layout is replayed on the calls that are there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lora_fx.graph.ops import aten, op_name
from lora_fx.injection.branch_layout import branch_sum, held, scaled_input
from lora_fx.injection.invocation_mask import tokens_of
from lora_fx.layers.adapter_tensors import Names, name_in, parameter_names
from lora_fx.layers.sites import Site, sites


@dataclass(frozen=True)
class Branch:
    """``out = base + [scale * (x @ down) @ up] [+ (layer - b) * gain] [+ bias]``, beside one call.

    Attributes:
        path: module path of the layer.
        name: the adapter's name.
        site: the layer's own call.
        down: ``get_attr`` node of (in, r), or None if nothing of low rank is added.
        up: ``get_attr`` node of (r, out), or None.
        scale: the factor that is not folded into ``up``; 1 when it is.
        bias: ``get_attr`` node of (out,), or None.
        gain: ``get_attr`` node of (out,), or None.
        col: ``get_attr`` node of (in,), which multiplies what the layer reads, or None.
        mask: node of the tokens that it acts at, (batch, length, 1), or None.
        base: what the branch is added to: the site, or the sum with an earlier branch.
        out: the sum; the same as ``base`` if there is a col alone.
    """

    path: str
    name: str
    site: fx.Node
    down: fx.Node | None
    up: fx.Node | None
    scale: float
    bias: fx.Node | None
    base: fx.Node
    out: fx.Node
    gain: fx.Node | None = None
    col: fx.Node | None = None
    mask: fx.Node | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it adds a product of two factors, and at most a bias, at every token."""
        apart = self.gain, self.col, self.mask
        return self.down is not None and all(node is None for node in apart)


def branches(gm: fx.GraphModule) -> list[Branch]:
    """Finds every branch, in the order of the layers that they stand beside."""
    return [branch for site in sites(gm) for branch in branches_of(site)]


def free_name(gm: fx.GraphModule) -> str:
    """A name for an adapter that is read out of a graph, which no branch of it has."""
    taken = {branch.name for branch in branches(gm)}
    names = ("raised", *(f"raised_{number}" for number in range(2, len(taken) + 2)))
    return next(name for name in names if name not in taken)


def branches_of(site: Site) -> Iterator[Branch]:
    """The branches beside one call of a layer, in the order they are added."""
    col = col_of(site)
    base, loose = site.node, col
    while (branch := _next(site, base, col)) is not None:
        if branch.col is not None:
            loose = None
        yield branch
        base = branch.out
    if loose is not None:
        name = name_in(str(loose.target))
        yield Branch(site.path, name, site.node, None, None, 1.0, None, base, base, None, loose)


def last_of(site: Site) -> fx.Node:
    """The call of a layer, or the sum with the last of its branches."""
    *_, last = [site.node, *(branch.out for branch in branches_of(site))]
    return last


def col_of(site: Site) -> fx.Node | None:
    """The vector that an adapter multiplies the layer's input with, or None."""
    scaled: Any = site.input
    if scaled.target is not aten.mul.Tensor:
        return None
    x: Any = scaled.args[0] if scaled.args else None
    found = _Found(scaled, {x}, most=5)
    col = _tensors(found.nodes, site)[1].get("col")
    with suppress(_AbsentError):
        if col is not None and scaled_input(found, site, x, col) is scaled:
            return col
    return None


def input_of(site: Site, col: fx.Node | None) -> fx.Node:
    """What a low-rank part reads: what the layer does, or what another adapter's col multiplies."""
    x = site.input if col is None else site.input.args[0]
    assert isinstance(x, fx.Node)
    return x


def _next(site: Site, base: fx.Node, col: fx.Node | None) -> Branch | None:
    sums = [out for out in base.users if out.target is aten.add.Tensor and out.args[:1] == (base,)]
    found = (_branch(site, base, out, col) for out in sums)
    return next((branch for branch in found if branch is not None), None)


def _branch(site: Site, base: fx.Node, out: fx.Node, col: fx.Node | None) -> Branch | None:
    """Reads what a sum adds, or None if that is somebody else's code."""
    mask = _mask_in(out)
    stops = {base, site.node, site.bias, site.input, input_of(site, col), mask}
    found = _Found(out, stops)
    name, tensors = _tensors(found.nodes, site)
    if not name or ("down" in tensors) != ("up" in tensors):
        return None
    mine = col if col is not None and name_in(str(col.target)) == name else None
    x = input_of(site, None if mine else col)
    dropped = (n for n in found.nodes if x in n.all_input_nodes and op_name(n) == "dropout")
    factors = (f for n in found.nodes if n.target is aten.mul.Tensor for f in n.args[1:])
    scale = next((factor for factor in factors if isinstance(factor, float)), None)
    with suppress(_AbsentError):
        if branch_sum(found, site, base, tensors, next(dropped, x), scale, mask) is out:
            part = tensors.get
            return Branch(
                site.path, name, site.node, part("down"), part("up"),
                1.0 if scale is None else scale, part("bias"), base, out, part("gain"), mine,
                mask,
            )  # fmt: skip
    return None


def _mask_in(out: fx.Node) -> fx.Node | None:
    """The mask that a sum's branch is multiplied by, without the view of a flat one."""
    delta = out.args[1] if len(out.args) > 1 else None
    if not isinstance(delta, fx.Node) or delta.target is not aten.mul.Tensor:
        return None
    factor = delta.args[1] if len(delta.args) > 1 else None
    if not isinstance(factor, fx.Node) or tokens_of(factor) is None:
        return None
    inner = factor.args[0] if factor.target is aten.view.default else factor
    return inner if isinstance(inner, fx.Node) else None


class _AbsentError(Exception):
    """A call of a branch that is not in the graph."""


class _Found:
    """A `Builder` that finds the calls instead of making them.

    Attributes:
        nodes: what a value is computed from, itself first, up to ``stops``: among these it looks.
            No nodes if they are more than a branch is made of.
    """

    def __init__(self, end: fx.Node, stops: set[Any], most: int = 25) -> None:
        self.nodes = [end]
        for node in self.nodes:  # grows
            read = () if node in stops else node.all_input_nodes
            if node.target is aten.index_select.default:
                read = read[:1]  # what it takes, and not the places
            self.nodes += [source for source in read if source not in self.nodes]
            if len(self.nodes) > most:
                self.nodes = []
                return

    def call(self, target: Any, arguments: tuple[Any, ...], axis: str | None = "out") -> fx.Node:
        for node in self.nodes:
            if node.target is not target or node.kwargs:
                continue
            if node.args == arguments:
                return node
            is_cut = len(node.args) != len(arguments)
            if is_cut and _told(target, node.args) == _told(target, arguments):
                return node
        raise _AbsentError

    def index(self, tensor: fx.Node, places: tuple[int, ...]) -> fx.Node:
        for node in self.nodes:
            if node.target is aten.index_select.default and node.args[:1] == (tensor,):
                index = node.all_input_nodes[-1]
                if index.op == "get_attr" and held(index).tolist() == list(places):
                    return index
        raise _AbsentError


def _told(target: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments without the defaults at their end, which torch.export leaves out."""
    known = target._schema.arguments if isinstance(target, torch._ops.OpOverload) else ()
    end = min(len(arguments), len(known))
    while end and arguments[end - 1] == known[end - 1].default_value:
        end -= 1
    return arguments[: end or None]


def _tensors(nodes: Sequence[fx.Node], site: Site) -> tuple[str, dict[str, fx.Node]]:
    """The tensors among these that an adapter brought to a layer, and the adapter's name.

    Without a name if there are none, or of several adapters.
    """
    found, adapters = {}, set()
    for node in nodes:
        if node.op != "get_attr":
            continue
        target = str(node.target)
        names = parameter_names(site.path, name_in(target), site.bare)
        if target in names:
            found[Names._fields[names.index(target)]] = node
            adapters.add(name_in(target))
    return (adapters.pop(), found) if len(adapters) == 1 else ("", {})
