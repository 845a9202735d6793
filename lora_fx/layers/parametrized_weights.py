"""Parametrized weights: ``W' = f(W, values)`` where an adapter put it into a graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx

from lora_fx.graph.ops import aten, needed
from lora_fx.layers.parameter_names import name_in, part_of

_MARK = ".lora_weight_"
_STEPS = 200  # nodes that an operand may be made of: what is more is no adapter's function


def value_names(path: str, name: str, count: int, bare: bool = False) -> list[str]:
    """What adapter ``name`` calls the values from which it makes the weight of a layer anew."""
    at, own = f"{path}_adapted" if bare else path, part_of(name)
    return [f"{at}{_MARK}{place}.{own}" for place in range(count)]


def recorded(graph: fx.Graph) -> Mapping[fx.Node, fx.Node]:
    """The operands that an adapter made: each with the stored weight that it was made of.

    Such an operand is an ``alias``, which says where the adapter's calls end and the model's begin,
    of what is computed from stored tensors alone, an adapter's values among them.
    """
    ends = graph.find_nodes(op="call_function", target=aten.alias.default)
    found = {end: _stored(end) for end in ends}
    return {end: source for end, source in found.items() if source is not None}


def made_anew(graph: fx.Graph) -> list[tuple[fx.Node, str, fx.Node]]:
    """Every operand that an adapter made: the operand, the adapter's name, the stored weight."""
    return [(made, adapter_of(made), source) for made, source in recorded(graph).items()]


def makers(operands: Iterable[fx.Node]) -> set[fx.Node]:
    """The calls by which adapters make operands, these included: no layer is among them."""
    return {node for operand in operands for node in needed(operand)}


def adapter_of(operand: fx.Node) -> str:
    """The name of the adapter that made an operand, or ``""`` if none did."""
    pending, steps = [operand], 0
    while pending and steps < _STEPS:
        node, steps = pending.pop(), steps + 1
        if node.op == "get_attr" and _MARK in str(node.target):
            return name_in(str(node.target))
        pending.extend(node.all_input_nodes)
    return ""


def _stored(end: fx.Node) -> fx.Node | None:
    """The weight that an adapter made an operand of, or None if no adapter did."""
    source, is_made = None, False
    pending, steps = list(end.all_input_nodes), 0
    while pending and steps < _STEPS:
        node, steps = pending.pop(), steps + 1
        if node.op == "get_attr":
            is_made = is_made or _MARK in str(node.target)
            source = source if _MARK in str(node.target) else node
        elif node.op != "call_function":
            return None
        pending.extend(node.all_input_nodes)
    return source if is_made and not pending else None
