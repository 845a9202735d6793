"""Matches low-rank branches in a graph, by its structure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import fx

from lora_fx.graph.ops import aten, op_name
from lora_fx.layers.branch_calls import parts_of_expand, parts_of_shrink
from lora_fx.layers.parameter_names import name_in, part_of
from lora_fx.layers.sites import Site, sites


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
    while (branch := _next(base, site, col)) is not None:
        if branch.col is not None:
            loose = None
        yield branch
        base = branch.out
    if loose is not None:
        name = _adapter(loose)
        yield Branch(site.path, name, site.node, None, None, 1.0, None, base, base, None, loose)


def last_of(site: Site) -> fx.Node:
    """The call of a layer, or the sum with the last of its branches."""
    *_, last = [site.node, *(branch.out for branch in branches_of(site))]
    return last


def col_of(site: Site) -> fx.Node | None:
    """The vector that an adapter multiplies the layer's input with, or None."""
    parts = _parts(site.input, "mul")
    col = whole(parts[1]) if parts else None
    return col if _is_named(col, site, "col") else None


def _next(base: fx.Node, site: Site, col: fx.Node | None) -> Branch | None:
    sums = [out for out in base.users if out.target is aten.add.Tensor and out.args[0] is base]
    found = (_branch(out, base, site, col) for out in sums)
    return next((branch for branch in found if branch is not None), None)


def _branch(out: fx.Node, base: fx.Node, site: Site, col: fx.Node | None) -> Branch | None:
    delta, bias, gain = out.args[1], None, None
    if _is_named(alone := whole(delta), site, "bias"):
        return _bias_alone(alone, out, base, site)
    if (parts := _parts(delta, "add")) and _is_named(whole(parts[1]), site, "bias"):
        delta, bias = parts[0], whole(parts[1])
    low, rest = delta, _parts(delta, "add")
    if (found := _gain(delta, site)) is not None:
        low, gain = None, found
    elif rest and (found := _gain(rest[1], site)) is not None:
        low, gain = rest[0], found
    factors = _low_rank(low, site)
    if factors is None and (low is not None or gain is None):
        return None
    down, up, scale = factors or (None, None, 1.0)
    name = _adapter(down or gain)
    mine = col if col is not None and _adapter(col) == name else None
    return Branch(site.path, name, site.node, down, up, scale, bias, base, out, gain, mine)


def _bias_alone(bias: fx.Node, out: fx.Node, base: fx.Node, site: Site) -> Branch:
    return Branch(site.path, _adapter(bias), site.node, None, None, 1.0, bias, base, out)


def _low_rank(delta: Any, site: Site) -> tuple[fx.Node, fx.Node, float] | None:
    scale = 1.0
    if (parts := _parts(delta, "mul")) and isinstance(parts[1], float):
        delta, scale = parts
    expand = parts_of_expand(delta, site) if isinstance(delta, fx.Node) else None
    if expand is None or not isinstance(expand[0], fx.Node):
        return None
    shrink, up = parts_of_shrink(expand[0], site), whole(expand[1])
    down = whole(shrink[1]) if shrink else None
    if down is None or not (_is_named(up, site, "up") and _is_named(down, site, "down")):
        return None
    return down, up, scale


def _gain(value: Any, site: Site) -> fx.Node | None:
    """The gain of ``mul(layer - b, gain)``."""
    parts = _parts(value, "mul")
    gain = whole(parts[1]) if parts else None
    if parts is None or not _is_named(gain, site, "gain"):
        return None
    without = _parts(parts[0], "sub")
    is_layer = parts[0] is site.node or (without is not None and without[0] is site.node)
    return gain if is_layer else None


def whole(value: Any) -> Any:
    """The factor or vector of a whole layer, of which a call that reads a part takes a part.

    Where features are not on the last axis, what a call takes of a vector is a view.
    """
    while isinstance(value, fx.Node) and op_name(value) in ("view", "slice", "index_select"):
        value = value.args[0]
    return value


def _parts(value: Any, operator: str) -> tuple[Any, Any] | None:
    if not isinstance(value, fx.Node) or op_name(value) != operator or len(value.args) != 2:
        return None
    return value.args[0], value.args[1]


def _adapter(node: fx.Node | None) -> str:
    return name_in(str(node.target)) if node is not None else ""


def _is_named(value: Any, site: Site, part: str) -> bool:
    is_fetched = isinstance(value, fx.Node) and value.op == "get_attr"
    names = parameter_names(site.path, _adapter(value) if is_fetched else "", site.bare)
    return is_fetched and value.target == getattr(names, part)
