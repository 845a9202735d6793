"""Branches beside layers: their layout, said once, and found in a graph by replaying it there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol

import torch
from torch import fx

from lora_fx.graph.lazy_tensor import get_unevaluated
from lora_fx.graph.ops import aten, op_name
from lora_fx.injection.invocation_mask import reads_flat, tokens_of
from lora_fx.layers.adapter_tensors import Names, adapters_of, name_in, parameter_names
from lora_fx.layers.sites import Groups, Site, sites
from lora_fx.layers.weight_parts import Places

Beside = Mapping[str, frozenset[str]]  # path of a layer -> the adapters there


class Builder(Protocol):
    """Makes the calls of a branch, or finds those that a graph has."""

    def call(self, target: Any, arguments: tuple[Any, ...], axis: str | None = "out") -> fx.Node:
        """A call; its result is the layer's but for this axis, or nothing of the kind if None."""

    def index(self, tensor: fx.Node, places: tuple[int, ...]) -> fx.Node:
        """The constant of the places at which a part of a stored tensor is taken."""


def branch_sum(
    builder: Builder,
    site: Site,
    base: fx.Node,
    tensors: Mapping[str, fx.Node],
    x: fx.Node,
    scale: float | None = None,
    mask: fx.Node | None = None,
) -> fx.Node:
    """``base + ([scale * (x @ down) @ up] + [(layer - b) * gain] + [bias]) [* mask]``.

    Args:
        builder: what makes each call, or finds it.
        site: the layer's call.
        base: what is added to: the call, or the sum with an earlier branch.
        tensors: the ``get_attr`` nodes of those that there are, by their names above.
        x: what the low-rank part reads.
        scale: a factor of the low-rank part that is not folded into ``up``.
        mask: (batch, length, 1), of the tokens that the branch is added at; all by default.

    Returns:
        The sum, or base itself if nothing is added.
    """

    def part(name: str) -> fx.Node:
        return _part(builder, site, tensors[name], name)

    terms: list[fx.Node] = []
    if "down" in tensors:
        kind = site.type
        narrow = builder.call(*kind.shrink(site, x, part("down")), axis="r")
        is_grouped = site.groups > 1
        groups = rank_of(site, "down", tensors) // rank_of(site, "up", tensors) if is_grouped else 1
        low = builder.call(*kind.expand(site, narrow, part("up"), groups))
        terms.append(low if scale is None else builder.call(aten.mul.Tensor, (low, scale)))
    if "gain" in tensors:
        layer = _without_bias(builder, site)
        terms.append(builder.call(aten.mul.Tensor, (layer, part("gain"))))
    if "bias" in tensors and site.has_first:
        terms.append(part("bias"))  # once, where several calls sum up parts of the inputs
    if not terms:
        return base
    delta = reduce(lambda one, two: builder.call(aten.add.Tensor, (one, two)), terms)
    if mask is not None:
        if reads_flat(site):
            mask = builder.call(aten.view.default, (mask, [-1, 1]), axis=None)
        delta = builder.call(aten.mul.Tensor, (delta, mask))
    return builder.call(aten.add.Tensor, (base, delta))


def rank_of(site: Site, factor: str, tensors: Mapping[str, fx.Node]) -> int:
    """The size of the inner axis of a factor: that of ``up`` is less beside groups."""
    return int(held(tensors[factor]).shape[site.type.axis(factor, "r")])


def held(node: fx.Node) -> Any:
    """The tensor that a ``get_attr`` node fetches."""
    assert node.graph.owning_module is not None
    return get_unevaluated(node.graph.owning_module, str(node.target))


def scaled_input(builder: Builder, site: Site, x: fx.Node, col: fx.Node) -> fx.Node:
    """``x * col``, which the layer reads in place of x."""
    return builder.call(aten.mul.Tensor, (x, _part(builder, site, col, "col")), axis=None)


def _without_bias(builder: Builder, site: Site) -> fx.Node:
    if site.bias is None:
        return site.node
    bias, sizes = site.bias, site.type.shape("vector", {"n": -1}, site.shape[2:])
    if len(sizes) > 1:
        bias = builder.call(aten.view.default, (bias, list(sizes)), axis=None)
    return builder.call(aten.sub.Tensor, (site.node, bias))


def _part(builder: Builder, site: Site, tensor: fx.Node, name: str) -> fx.Node:
    """What a call reads of a tensor of its layer: of all places, unless it reads a part of W."""
    is_factor, is_of_x = name in ("down", "up"), name in ("down", "col")
    places = site.inputs if is_of_x else site.outputs
    if places is not None:
        axis = site.type.axis(name, "in" if is_of_x else "out") if is_factor else 0
        tensor = _taken(builder, tensor, axis, places)
    behind = 0
    if site.labels is not None and not is_factor:
        behind = site.labels.before if is_of_x else site.labels.behind
    if not behind:
        return tensor
    return builder.call(aten.view.default, (tensor, [-1, *[1] * behind]), axis=None)


def _taken(builder: Builder, tensor: fx.Node, axis: int, places: Places) -> fx.Node:
    if isinstance(places, range):
        steps = () if places.step == 1 else (places.step,)
        arguments = (tensor, axis, places.start, places.stop, *steps)
        return builder.call(aten.slice.Tensor, arguments, axis=None)
    index = builder.index(tensor, places)
    return builder.call(aten.index_select.default, (tensor, axis, index), axis=None)


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


def adapters_at(site: Site) -> list[str]:
    """The names of the adapters at a layer: beside it, and in its weight."""
    return [*(branch.name for branch in branches_of(site)), *adapters_of(site.operand)]


def adapters_beside(groups: Groups, paths: Iterable[str]) -> Beside:
    """The names of the adapters at the layers of a graph that are among these paths."""
    return {path: frozenset(adapters_at(groups[path][0])) for path in paths if path in groups}


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
    scaled = (n for n in found.nodes if n.target is aten.mul.Tensor and n not in stops)
    scale = next((f for n in scaled for f in n.args[1:] if isinstance(f, float)), None)
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
