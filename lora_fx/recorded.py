"""Weights that an adapter made anew: ``function(W, values)``, as the graph computes it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from lora_fx.row_blocks import SPLITS

_MARK = ".lora_weight_"
_DEPTH = 6  # calls between a stored weight and the value that it meets


def value_names(path: str, name: str, count: int, bare: bool = False) -> list[str]:
    """What adapter ``name`` calls the values from which it makes the weight of a layer anew."""
    at = f"{path}_adapted" if bare else path
    return [f"{at}{_MARK}{place}.{name}" for place in range(count)]


def recorded(graph: fx.Graph) -> Mapping[fx.Node, fx.Node]:
    """The operands that an adapter made: each with the stored weight that it was made of.

    Told by the names of the values that went in.
    """
    seeds = [n for n in graph.nodes if n.op == "get_attr" and _MARK in str(n.target)]
    made = set(seeds)
    pending = list(seeds)
    while pending:
        for user in pending.pop().users:
            is_new = user not in made and user.op == "call_function"
            # What takes rows of a weight reads it: it is no part of how the weight was made.
            if is_new and user.target not in SPLITS and _is_constant(user, made):
                made.add(user)
                pending.append(user)
    ends = (n for n in made - set(seeds) if any(user not in made for user in n.users))
    return {end: _stored(end) for end in ends}


def made_anew(graph: fx.Graph) -> list[tuple[fx.Node, str, fx.Node]]:
    """Every operand that an adapter made: the operand, the adapter's name, the stored weight."""
    return [(made, adapter_of(made), source) for made, source in recorded(graph).items()]


def adapter_of(operand: fx.Node) -> str:
    """The name of the adapter that made an operand, or ``""`` if none did."""
    pending, depth = [operand], _DEPTH
    while pending and depth:
        for node in pending:
            if node.op == "get_attr" and _MARK in str(node.target):
                return str(node.target).rpartition(".")[2]
        pending = [n for node in pending for n in node.all_input_nodes]
        depth -= 1
    return ""


def _is_constant(node: fx.Node, made: set[fx.Node], depth: int = _DEPTH) -> bool:
    """Whether a call reads nothing but what is stored or made from it, in a few steps."""
    return depth > 0 and all(
        n in made
        or n.op == "get_attr"
        or (n.op == "call_function" and n.all_input_nodes and _is_constant(n, made, depth - 1))
        for n in node.all_input_nodes
    )


def _stored(end: fx.Node) -> fx.Node:
    """The weight that a recorded operand is made of: the one stored tensor that is no value."""
    pending = [end]
    while pending:
        node = pending.pop()
        if node.op == "get_attr" and _MARK not in str(node.target):
            return node
        pending.extend(node.all_input_nodes)
    raise AssertionError(f"{end} is made of an adapter's values alone")
