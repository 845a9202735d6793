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
from lora_fx.recorded import recorded
from lora_fx.row_blocks import Part, Places, Read, part_of
from lora_fx.site_paths import is_packed, paths_of

# A layer's operator: its kind, and where it reads its input, its weight and its bias.
_OPERATORS: dict[Any, tuple[str, int, int, int | None]] = {
    aten.linear.default: ("linear", 0, 1, 2),
    aten.addmm.default: ("linear_transposed", 1, 2, 0),
    aten.embedding.default: ("embedding", 1, 0, None),
    aten.conv1d.default: ("conv1d", 0, 1, 2),
    aten.conv2d.default: ("conv2d", 0, 1, 2),
    aten.conv3d.default: ("conv3d", 0, 1, 2),
    aten.conv1d.padding: ("conv1d", 0, 1, 2),
    aten.conv2d.padding: ("conv2d", 0, 1, 2),
    aten.conv3d.padding: ("conv3d", 0, 1, 2),
}

_CALLS = ("call_function", "call_method")
# The kind of a layer whose operand is what is stored, transposed.
_TURNED = {"linear": "linear_transposed", "linear_transposed": "linear"}


@dataclass(frozen=True, kw_only=True)
class Site(Layer):
    """One call of a layer.

    Attributes:
        node: the call: ``linear(x, W, b)``, or ``addmm(b, x, W)`` for a transposed weight,
            ``embedding(W, ids)``, ``conv2d(x, W, b, ...)``. Several calls may be of one path.
        weight: the ``get_attr`` node of W.
        bias: the node of b, (out,), or None.
        part: what the call reads of W.
    """

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    part: Part

    @property
    def input(self) -> fx.Node:
        """The node of x, (..., in), as the graph has it now."""
        return cast(fx.Node, self.node.args[_OPERATORS[self.node.target][1]])

    @property
    def operand(self) -> fx.Node:
        """What the call reads as its weight: W, rows of it, or what an adapter made of it."""
        return cast(fx.Node, self.node.args[_OPERATORS[self.node.target][2]])

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
        return self.path == self.weight.target

    @property
    def packed(self) -> bool:
        """Whether it is the projection of an attention module that packs three in one."""
        return is_packed(str(self.weight.target))


def sites(gm: fx.GraphModule) -> list[Site]:
    """The layers of a graph, in order, by the paths that `paths_of` gives them."""
    bases = recorded(gm.graph)
    found = [site for node in gm.graph.nodes if (site := _site(gm, node, bases))]
    paths = paths_of((site.path, str(site.weight.target)) for site in found)
    return [replace(site, path=paths[site.path, str(site.weight.target)]) for site in found]


def _site(gm: fx.GraphModule, node: fx.Node, bases: Mapping[fx.Node, fx.Node]) -> Site | None:
    operator = _OPERATORS.get(node.target)
    if operator is None or (operator[0] == "linear_transposed" and len(node.args) != 3):
        return None
    kind, _, place, bias = operator
    part = part_of(gm, node.args[place], bases)
    if part is None or (kind == "linear_transposed" and node.kwargs):
        return None
    if _is_factor(str(part.source.target)):
        return None
    tensor = raw(gm, str(part.source.target))
    axes = 2 if not kind.startswith("conv") else 2 + int(kind[4])
    if len(tensor.shape) != axes:
        return None  # a vector: nothing with an input and an output side
    kind = _TURNED.get(kind, "") if part.turned else kind
    groups = int(call_argument(node, 6, "groups", 1)) if kind.startswith("conv") else 1
    if not kind or (groups > 1 and part.calls):
        return None
    out, into, *kernel = tensor.shape
    if kind in ("linear_transposed", "embedding"):
        out, into = into, out
    shape = (out, into * groups, *kernel)
    b = None if bias is None else call_argument(node, bias, "bias")
    return Site(
        path=module_path(node),
        kind=kind,
        shape=shape,
        dtype=tensor.dtype,
        groups=groups,
        node=node,
        weight=part.source,
        bias=b,
        part=part,
    )


def _is_factor(target: str) -> bool:
    """Whether a tensor is one that an injected adapter brought: `branches.parameter_names`."""
    return target.split(".")[-2:-1] in (["lora_A"], ["lora_B"])


def by_path(gm: fx.GraphModule) -> dict[str, list[Site]]:
    """The sites of a graph, grouped by path: more than one where a layer is called again."""
    groups: dict[str, list[Site]] = defaultdict(list)
    for site in sites(gm):
        groups[site.path].append(site)
    return dict(groups)


def readers(gm: fx.GraphModule, parameter: str) -> Iterator[Read]:
    """Who reads ``<module path>.<name>``: pairs of a call and the ``get_attr`` node it reads.

    Told by the module that made the call, since a tied parameter bears another module's name;
    where none did, by the layer that the graph has at that path, or the table of that name.
    """
    path, _, name = parameter.rpartition(".")
    calls = [n for n in gm.graph.nodes if n.op in _CALLS and module_path(n) == path]
    if not calls:
        layers = sites(gm)
        of_name = [s for s in layers if s.path == path]
        found = of_name or [s for s in layers if _is_table(s, parameter)]
        calls = list(dict.fromkeys(call for site in found for call in _calls(gm, site)))
    for node in calls:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and str(source.target).rpartition(".")[2] == name:
                yield node, source


def _calls(gm: fx.GraphModule, site: Site) -> tuple[fx.Node, ...]:
    """A layer's call, and what picks its weight and bias."""
    bias = part_of(gm, site.bias)
    return *site.part.calls, *(bias.calls if bias else ()), site.node


def _is_table(site: Site, parameter: str) -> bool:
    return site.kind == "embedding" and site.is_whole and site.weight.target == parameter
