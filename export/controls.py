"""Models that must not agree with the exported one: a check that cannot fail checks nothing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx, nn

from lora_fx.export.eager import evaluating
from lora_fx.export.evidence import Subject
from lora_fx.graphs import assign, attribute
from lora_fx.passes import StripLora, UnfoldLora
from lora_fx.sites import sites

_FACTOR = 1.1
_ATTEMPTS = 8


NO_ADAPTERS = "control: no adapters"


def controls(gm: fx.GraphModule) -> Iterator[Subject]:
    """Candidates, best first: the base, if the graph has an adapter, then a weight scaled."""
    base = without_adapters(gm)
    if base is not None:
        yield Subject(NO_ADAPTERS, evaluating(base))
    for name, changed in with_a_weight_scaled(gm):
        yield Subject(f"control: {name} x {_FACTOR}", changed)


def without_adapters(gm: fx.GraphModule) -> fx.GraphModule | None:
    """The base of a graph, folded or not; None if it has no adapter that was injected."""
    stripped = StripLora()(UnfoldLora()(gm).graph_module)
    return stripped.graph_module if stripped.modified else None


def with_a_weight_scaled(gm: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    """The graph with one weight made 10 % larger: layers first, a few attempts.

    A layer in front of a normalisation may not care, so there is more than one.
    """
    layers = [str(site.weight.target) for site in sites(gm)]
    others = [str(node.target) for node in gm.graph.nodes if node.op == "get_attr"]
    for target in list(dict.fromkeys([*layers, *others]))[:_ATTEMPTS]:
        weight = attribute(gm, target)
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
            continue
        changed = evaluating(gm)
        larger = weight.detach() * _FACTOR
        is_parameter = isinstance(weight, nn.Parameter)
        assign(
            changed, target, nn.Parameter(larger, requires_grad=False) if is_parameter else larger
        )
        yield target, changed
