"""Matches low-rank branches in a graph: their layout is replayed on the calls that are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from lora_fx.graph.lazy_tensor import get_unevaluated
from lora_fx.graph.ops import aten, op_name
from lora_fx.injection.branch_layout import branch_sum, scaled_input
from lora_fx.layers.parameter_names import name_in, part_of
from lora_fx.layers.sites import Site, sites

_MOST = 25  # nodes that one branch is made of, all that it reads included


class Names(NamedTuple):
    """What a branch calls its tensors."""

    down: str
    up: str
    bias: str
    gain: str
    col: str


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

    @property
    def is_plain(self) -> bool:
        """Whether it adds a product of two factors, and at most a bias."""
        return self.down is not None and self.gain is None and self.col is None


def parameter_names(path: str, name: str, bare: bool = False) -> Names:
    """What the branch of adapter ``name`` at ``path`` calls its tensors.

    Where the path is that of a ``bare`` weight, they live beside it: nothing fits below a tensor.
    """
    at = f"{path}_adapted" if bare else path
    kinds = ("A", "B", "bias", "gain", "col")
    return Names(*(f"{at}.lora_{kind}.{part_of(name)}" for kind in kinds))


def branches(gm: fx.GraphModule) -> list[Branch]:
    """Finds every branch, in the order of the layers that they stand beside."""
    return [branch for site in sites(gm) for branch in branches_of(site)]


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
    scaled = site.input
    if scaled.target is not aten.mul.Tensor or not isinstance(scaled.args[1], fx.Node):
        return None
    x: Any = scaled.args[0]
    found = _Found(_reached(scaled, {x}, most=5))
    _, tensors = _tensors(found.nodes, site)
    if "col" not in tensors:
        return None
    end = _replayed(scaled_input, found, site, x, tensors["col"])
    return tensors["col"] if end is scaled else None


def branch_input(site: Site, col: fx.Node | None) -> fx.Node:
    """What a low-rank part reads: what the layer does, or what another adapter's col multiplies."""
    x = site.input if col is None else site.input.args[0]
    assert isinstance(x, fx.Node)
    return x


def _next(site: Site, base: fx.Node, col: fx.Node | None) -> Branch | None:
    sums = [out for out in base.users if out.target is aten.add.Tensor and out.args[0] is base]
    found = (_branch(site, base, out, col) for out in sums)
    return next((branch for branch in found if branch is not None), None)


def _branch(site: Site, base: fx.Node, out: fx.Node, col: fx.Node | None) -> Branch | None:
    """Reads what a sum adds, or None if that is somebody else's code."""
    stops = {base, site.node, site.bias, site.input, branch_input(site, col)}
    found = _Found(_reached(out, stops, _MOST))
    name, tensors = _tensors(found.nodes, site)
    if not name or ("down" in tensors) != ("up" in tensors):
        return None
    mine = col if col is not None and name_in(str(col.target)) == name else None
    x, scale = found.dropped(branch_input(site, None if mine else col)), found.scale
    sum_ = _replayed(branch_sum, found, site, base, tensors, x, scale, _groups(site, tensors))
    if sum_ is not out:
        return None
    part = tensors.get
    return Branch(
        site.path, name, site.node, part("down"), part("up"), 1.0 if scale is None else scale,
        part("bias"), base, out, part("gain"), mine,
    )  # fmt: skip


class _AbsentError(Exception):
    """A call of a branch that is not in the graph."""


def _replayed(layout: Callable[..., fx.Node], *arguments: Any) -> fx.Node | None:
    try:
        return layout(*arguments)
    except _AbsentError:
        return None


class _Found:
    """A `Builder` that finds the calls instead of making them.

    Attributes:
        nodes: among which it looks.
    """

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self.nodes = nodes

    def call(self, target: Any, arguments: tuple[Any, ...], axis: str | None = "out") -> fx.Node:
        for node in self.nodes:
            if node.target is target and not node.kwargs and _are_same(node, arguments):
                return node
        raise _AbsentError

    def index(self, tensor: fx.Node, places: tuple[int, ...]) -> fx.Node:
        for node in self.nodes:
            if node.target is aten.index_select.default and node.args[0] is tensor:
                index: Any = node.args[2]
                if index.op == "get_attr" and _held(index).tolist() == list(places):
                    return index
        raise _AbsentError

    @property
    def scale(self) -> float | None:
        """The number that something is multiplied with, if there is one."""
        factors = (node.args[1] for node in self.nodes if node.target is aten.mul.Tensor)
        return next((factor for factor in factors if isinstance(factor, float)), None)

    def dropped(self, x: fx.Node) -> fx.Node:
        """What a dropout made of x, or x where there is none."""
        made = (n for n in self.nodes if x in n.all_input_nodes and op_name(n) == "dropout")
        return next(made, x)


def _are_same(node: fx.Node, arguments: tuple[Any, ...]) -> bool:
    """Whether a call has these arguments; torch.export leaves out defaults at their end."""
    if node.args == arguments:
        return True
    known = getattr(node.target, "_schema", None)
    return known is not None and _told(known, node.args) == _told(known, arguments)


def _told(schema: torch.FunctionSchema, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    end = min(len(arguments), len(schema.arguments))
    while end and arguments[end - 1] == schema.arguments[end - 1].default_value:
        end -= 1
    return arguments[:end]


def _reached(end: fx.Node, stops: set[Any], most: int) -> list[fx.Node]:
    """What a value is computed from, itself first, up to some nodes; nothing if that is more."""
    found = [end]
    for node in found:  # grows
        read = () if node in stops else node.all_input_nodes
        if node.target is aten.index_select.default:
            read = read[:1]  # what it takes, and not the places
        found += [source for source in read if source not in found]
        if len(found) > most:
            return []
    return found


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


def _groups(site: Site, tensors: dict[str, fx.Node]) -> int:
    """Of the up-projection: how many times its rank goes into that of down."""
    if site.groups == 1 or not {"down", "up"} <= tensors.keys():
        return 1
    down, up = (_held(tensors[part]).shape[site.type.axis(part, "r")] for part in ("down", "up"))
    return int(down // up)


def _held(node: fx.Node) -> Any:
    gm = node.graph.owning_module
    assert gm is not None
    return get_unevaluated(gm, str(node.target))
