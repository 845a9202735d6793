"""The bias of a layer as one vector, added by its own call or behind it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from lora_fx.graph.constants import Constants
from lora_fx.graph.lazy_tensor import evaluate, get_unevaluated
from lora_fx.graph.ops import needed
from lora_fx.layers.sites import Site


def bias_of(gm: fx.GraphModule, calls: Sequence[Site]) -> torch.Tensor | None:
    """The bias of all outputs, (out,), from the calls of a layer: a part of one may be each call's.

    Returns:
        None if no call has a bias that is known before the graph runs.
    """
    known = {site.node: value for site in calls if (value := _value(gm, site.bias)) is not None}
    if not known:
        return None
    first = next(iter(known.values()))
    if len(first) == calls[0].out_features and all(site.is_whole for site in calls):
        return first
    total = first.new_zeros(calls[0].out_features)
    added = set()
    # Calls that sum up parts of the inputs: the one with the first input comes before the others.
    for site in sorted(calls, key=lambda site: not _has_first(site)):
        if site.node not in known or site.part[1:3] in added:
            continue
        places = slice(None) if site.outputs is None else list(site.outputs)
        if _has_first(site):
            total[places] = known[site.node]
        else:
            added.add(site.part[1:3])
            total[places] += known[site.node]
    return total


def _has_first(site: Site) -> bool:
    return site.inputs is None or 0 in site.inputs


def _value(gm: fx.GraphModule, node: fx.Node | None) -> torch.Tensor | None:
    if node is None:
        return None
    if node.op == "get_attr":
        return evaluate(get_unevaluated(gm, str(node.target)))
    constants = Constants(gm)
    if not all(constants.admit(step) for step in needed(node)):
        return None
    value = constants.value(node).to(constants.dtype(node))
    return value if isinstance(value, torch.Tensor) and value.ndim == 1 else None
