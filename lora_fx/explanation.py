"""What fold would do with each layer of a graph, why not more, and what else could be done."""

from __future__ import annotations

from torch import fx

from lora_fx.adapters.updates import NO_WEIGHT
from lora_fx.affine.affine_map import AffineMap
from lora_fx.affine.analysis import Analysis, Opaque
from lora_fx.affine.region import Region
from lora_fx.affine.region_boundary import is_layer, is_stored, stored_in
from lora_fx.affine.region_selection import maximal_regions
from lora_fx.affine.transfer import analyse
from lora_fx.branch_lowering.selection import choices
from lora_fx.choices import takes
from lora_fx.errors import PassError, shorten
from lora_fx.graph.ops import module_path, op_name
from lora_fx.injection.branches import branches
from lora_fx.layers.adapter_tensors import is_factor, parametrized_weights
from lora_fx.layers.layer_types import OPERATORS
from lora_fx.tables import table

_FREE = "the graph was not folded, which would merge it"


class Explanation(tuple[str, ...]):
    """A line for each layer; ``print`` shows them, and a notebook a table of them."""

    __slots__ = ()

    def __str__(self) -> str:
        """The lines below each other."""
        return "\n".join(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cells = (line.partition(": ")[::2] for line in self)
        return table(["layer", "what fold makes of it"], cells)


@takes(PassError)
def explain(gm: fx.GraphModule) -> Explanation:
    """A line for each layer: what it is a function of, and what `fold` makes of it.

    Where a branch stands beside it, also the form that an unmerged export computes it in, and what
    that and the other forms cost beyond the merged layer.

    Args:
        gm: a traced graph; it is read, not run, and no weight is computed.

    Returns:
        The lines, for ``print``.
    """
    analysis = analyse(gm)
    regions = {node: region for region in maximal_regions(analysis) for node in region.nodes}
    layers = [node for node in analysis.values if _is_own(node, analysis)]
    forms = _forms(gm)
    return Explanation(
        _line(node, analysis, regions.get(node)) + forms.get(node, "") for node in layers
    )


def _is_own(node: fx.Node, analysis: Analysis) -> bool:
    """Whether a call is a layer, and no factor that an adapter brought."""
    if not is_layer(node) or not is_stored(node, analysis):
        return False
    weight = stored_in(node, analysis.gm)
    return node.target in OPERATORS or weight is None or not is_factor(str(weight.target))


def _forms(gm: fx.GraphModule) -> dict[fx.Node, str]:
    """What to say of each layer with a branch: its form as a constant, and as a slot."""
    slots = {m.site.node: m.form for group in choices(gm, "input") for m in group.members}
    return {
        member.site.node: f"; unmerged: {group.why(member)}; as a slot: {slots[member.site.node]}"
        for group in choices(gm)
        for member in group.members
    }


def _line(node: fx.Node, analysis: Analysis, region: Region | None) -> str:
    value = analysis.values[node]
    name = f"{module_path(node) or node.name}: {op_name(node)}"
    if not isinstance(value, AffineMap) or value.parent is None:
        reason = value.reason if isinstance(value, Opaque) else "no function of one input"
        return f"{name}: stays, {reason}"
    rows, columns = value.weight.shape
    source = value.source.node.name
    return f"{name} {columns} -> {rows} of {source}: {_fate(node, analysis, region)}"


def _fate(node: fx.Node, analysis: Analysis, mine: Region | None) -> str:
    if mine is None:
        return f"one layer; {_ends(node, analysis)}"
    if mine.blocked:
        return f"stays, {mine.blocked}"
    end, count = mine.value.node.name, len(mine.nodes)
    if mine.layer is node:
        return f"becomes the layer of {count} calls up to {end}; {_ends(mine.value.node, analysis)}"
    return f"goes into {module_path(mine.layer) or mine.layer.name}, with {count} calls up to {end}"


def _ends(node: fx.Node, analysis: Analysis) -> str:
    """Who reads a result, and why that is no part of the same affine function."""
    return shorten([_why(user, analysis) for user in sorted(node.users)]) or "nobody reads it"


def _why(user: fx.Node, analysis: Analysis) -> str:
    if user.op == "output":
        return "the model returns it"
    reader = f"{user.name} ({module_path(user) or 'the model itself'}) reads it"
    value = analysis.values.get(user)
    if isinstance(value, Opaque):
        return f"{reader}: {value.reason}"
    return f"{reader}: a layer of its own" if _is_own(user, analysis) else f"{reader}: affine"


def is_unmerged(gm: fx.GraphModule) -> bool:
    """Whether a graph computes something of an adapter at each call."""
    return bool(branches(gm)) or bool(parametrized_weights(gm.graph))


def unmerged(gm: fx.GraphModule) -> dict[str, str]:
    """The layers whose adapters stand beside them: module path -> why they are not merged.

    Args:
        gm: a graph, after `fold` or without it.
    """
    standing = branches(gm)
    beside = {branch.path: branch.out for branch in standing}
    made = parametrized_weights(gm.graph)
    found = {module_path(m.operand) or str(m.stored.target): m.operand for m in made}
    if not beside and not found:
        return {}
    analysis = analyse(gm)
    regions = maximal_regions(analysis)
    blocked = {n: region.blocked or _FREE for region in regions for n in region.nodes}
    blocked |= {branch.out: NO_WEIGHT for branch in standing if branch.mask is not None}
    return {path: _reason(end, analysis, blocked) for path, end in (found | beside).items()}


def _reason(end: fx.Node, analysis: Analysis, blocked: dict[fx.Node, str]) -> str:
    if reason := blocked.get(end):
        return reason
    value = analysis.values.get(end)
    if isinstance(value, Opaque):
        return f"{end.name}: {value.reason}"
    return "its layer and its adapter are no function of one input"
