"""Who reads a weight that is taken apart, beside the layers that read parts of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from lora_fx.errors import AdapterError
from lora_fx.graph.ops import asks_sizes, module_path, op_name
from lora_fx.layers.parametrized_weights import makers, recorded
from lora_fx.layers.sites import Site


def is_one_way(calls: Sequence[Site]) -> bool:
    """Whether all calls of a layer read its weight on the same side."""
    return len({site.transposed for site in calls}) == 1


def check_one_way(calls: Sequence[Site]) -> None:
    """Refuses factors beside a weight whose inputs are the outputs of another call.

    Raises:
        AdapterError: one call multiplies with the weight, another with its transpose.
    """
    if not is_one_way(calls):
        raise AdapterError(
            f"one call multiplies with its weight {calls[0].weight.target}, another "
            "with the transpose, and factors stand beside one side alone. Leave the layer out, or "
            "give each call a weight of its own"
        )


def check_reached(gm: fx.GraphModule, path: str, groups: Mapping[str, Sequence[Site]]) -> None:
    """Refuses a layer of whose weight an adapter would reach some parts alone.

    Args:
        gm: the graph.
        path: of the layer.
        groups: all layers of the graph.

    Raises:
        AdapterError: something that is no layer reads a part of the weight.
    """
    calls = groups[path]
    if all(site.is_whole for site in calls):
        return
    layers = {site.node for group in groups.values() for site in group}
    picks = {call for group in groups.values() for site in group for call in site.part.calls}
    made = makers(recorded(gm.graph))
    weight = calls[0].weight.target
    pending = [node for node in gm.graph.find_nodes(op="get_attr") if node.target == weight]
    for node in pending:
        for user in node.users:
            if user in picks:
                pending.append(user)
            elif user not in layers and user not in made and _counts(user):
                at = module_path(user) or "the model itself"
                raise AdapterError(
                    f"parts of its weight {weight} are read by layers, and one by "
                    f"{op_name(user)} of {at}, which is none: the adapter would be missing there. "
                    "Leave the layer out, or apply the parts as linear layers"
                )


def _counts(user: fx.Node) -> bool:
    return not asks_sizes(user) and (bool(user.users) or user.op == "output")
