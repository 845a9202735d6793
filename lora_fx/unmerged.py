"""What an adapter added to a graph and fold left beside its layer, and why."""

from __future__ import annotations

from torch import fx

from lora_fx.affine.analysis import Analysis, Opaque
from lora_fx.affine.region_selection import maximal_regions
from lora_fx.affine.transfer import analyse
from lora_fx.graph.ops import module_path
from lora_fx.injection.match_branch import branches
from lora_fx.layers.parametrized_weights import made_anew


def is_unmerged(gm: fx.GraphModule) -> bool:
    """Whether a graph computes something of an adapter at each call."""
    return bool(branches(gm)) or bool(made_anew(gm.graph))


def unmerged(gm: fx.GraphModule) -> dict[str, str]:
    """The layers whose adapters stand beside them: module path -> why fold left them there.

    Args:
        gm: a graph after `fold`.
    """
    beside = {branch.path: branch.out for branch in branches(gm)}
    made = made_anew(gm.graph)
    found = {module_path(end) or str(weight.target): end for end, _, weight in made}
    if not beside and not found:
        return {}
    analysis = analyse(gm)
    blocked = {n: region.blocked for region in maximal_regions(analysis) for n in region.nodes}
    return {path: _reason(end, analysis, blocked) for path, end in (found | beside).items()}


def _reason(end: fx.Node, analysis: Analysis, blocked: dict[fx.Node, str]) -> str:
    if reason := blocked.get(end):
        return reason
    value = analysis.values.get(end)
    if isinstance(value, Opaque):
        return f"{end.name}: {value.reason}"
    return "its layer and its adapter are no function of one input, or of constants alone"
