"""The sizes of what a node computes, as far as they are known."""

from __future__ import annotations

from typing import Any

import torch

Sizes = tuple[Any, ...]  # of ints, and of SymInts where an axis is dynamic


def same_sizes(one: Sizes | None, other: Sizes | None) -> bool:
    """Whether sizes are equal whatever the inputs are; unknown ones are those of one source."""
    if one is None or other is None:
        return one is other
    return len(one) == len(other) and all(map(_same, one, other))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.SymInt) and isinstance(other, torch.SymInt):
        return bool(one.node.expr == other.node.expr)
    return type(one) is type(other) and bool(one == other)


def sizes_of(node: Any) -> Sizes | None:
    """The sizes that a node was traced with, or None."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None
