"""Operators that swap the two axes of a matrix."""

from __future__ import annotations

from typing import Any

from torch import fx

from lora_fx.graph.ops import op_name

_TURNS = {"t", "T", "numpy_T", "mT", "adjoint"}


def turns(node: fx.Node) -> bool:
    """Whether a call swaps the axes of a matrix."""
    name = op_name(node)
    rest: Any = node.args[1:]
    if name == "getattr":
        return rest[0] in _TURNS
    if name in ("transpose", "swapaxes", "swapdims") and len(rest) == 2:
        return {int(axis) % 2 for axis in rest} == {0, 1}
    order = rest[0] if len(rest) == 1 else rest
    if name == "permute":
        return tuple(order) in ((1, 0), (-1, -2))
    return name in _TURNS
