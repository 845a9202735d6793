"""A stored matrix that is read on its side."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import fx

from lora_fx.ops import op_name

TURNS = {"t", "T", "numpy_T", "mT", "adjoint"}
_IDLE = {"alias", "detach", "contiguous", "clone"}
_NOTHING: Mapping[fx.Node, fx.Node] = MappingProxyType({})


def turned_from(node: fx.Node, made: Mapping[fx.Node, fx.Node] = _NOTHING) -> tuple[fx.Node, bool]:
    """What a matrix is before it is turned around, and whether it then is on its other side.

    Args:
        node: of two axes.
        made: operands that adapters made, which are looked at no further.
    """
    steps = steps_from(node, made)
    return (steps[0].all_input_nodes[0] if steps else node), sum(map(turns, steps)) % 2 == 1


def steps_from(node: fx.Node, made: Mapping[fx.Node, fx.Node] = _NOTHING) -> list[fx.Node]:
    """The calls that turn a matrix around, or pass it on, up to a node, in order."""
    steps: list[fx.Node] = []
    while node not in made and (turns(node) or op_name(node) in _IDLE) and node.all_input_nodes:
        steps.insert(0, node)
        node = node.all_input_nodes[0]
    return steps


def turns(node: fx.Node) -> bool:
    """Whether a call swaps the axes of a matrix."""
    name = op_name(node)
    rest: Any = node.args[1:]
    if name == "getattr":
        return rest[0] in TURNS
    if name in ("transpose", "swapaxes", "swapdims") and len(rest) == 2:
        return {int(axis) % 2 for axis in rest} == {0, 1}
    order = rest[0] if len(rest) == 1 else rest
    if name == "permute":
        return tuple(order) in ((1, 0), (-1, -2))
    return name in TURNS
