"""Negative controls: models that must not agree with the file, or the check checks nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import fx, nn

from lora_fx.export.report import Reference
from lora_fx.export.verification.eager import evaluating
from lora_fx.graph.graph_module import assign
from lora_fx.graph.lazy_tensor import LazyTensor, get_unevaluated
from lora_fx.injection.injected_adapters import injected
from lora_fx.layers.sites import sites
from lora_fx.passes import StripLora, UnfoldLora
from lora_fx.reference.reference_run import WeightForm, weight_form

FACTOR = 1.1
_ATTEMPTS = 8


NO_ADAPTER = "control: no adapter"  # of a file that takes one
NO_ADAPTERS = f"{NO_ADAPTER}s"


def controls(gm: fx.GraphModule) -> Iterator[Reference]:
    """Candidates, best first: the base, if the graph has an adapter, then a weight scaled."""
    bare = weight_form(gm, ()) if injected(gm) else ""
    base = None if isinstance(bare, WeightForm) else without_adapters(gm)
    if isinstance(bare, WeightForm):
        yield Reference(NO_ADAPTERS, bare, like=gm)
    elif base is not None:
        yield Reference(NO_ADAPTERS, evaluating(base))
    for name, changed in with_a_weight_scaled(gm):
        yield Reference(f"control: {name} x {FACTOR}", changed)


def without_adapters(gm: fx.GraphModule) -> fx.GraphModule | None:
    """The base of a graph, folded or not; None if it has no adapter that was injected."""
    stripped = StripLora()(UnfoldLora()(gm).graph_module)
    return stripped.graph_module if stripped.modified else None


def with_a_weight_scaled(
    gm: fx.GraphModule, among: Collection[str] = ()
) -> Iterator[tuple[str, fx.GraphModule]]:
    """The graph with one weight made 10 % larger: layers first, a few attempts.

    A layer in front of a normalisation may not care, so there is more than one.

    Args:
        gm: the graph.
        among: names of weights; any by default.
    """
    layers = [str(site.weight.target) for site in sites(gm)]
    others = [str(node.target) for node in gm.graph.nodes if node.op == "get_attr"]
    every = dict.fromkeys([*layers, *others])
    for target in [name for name in every if not among or name in among][:_ATTEMPTS]:
        weight = get_unevaluated(gm, target)
        if isinstance(weight, torch.Tensor | LazyTensor) and weight.dtype.is_floating_point:
            changed = evaluating(gm)
            assign(changed, target, _larger(weight))
            yield target, changed


def _larger(weight: torch.Tensor | LazyTensor) -> torch.Tensor | LazyTensor:
    if isinstance(weight, LazyTensor):
        make, key = (lambda: weight.evaluate() * FACTOR), ("larger", weight.key)
        return LazyTensor(weight.shape, weight.dtype, make, key, cache=False)
    larger = weight.detach() * FACTOR
    is_parameter = isinstance(weight, nn.Parameter)
    return nn.Parameter(larger, requires_grad=False) if is_parameter else larger
