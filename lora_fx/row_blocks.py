"""Layers that read some rows of a weight: one projection that holds several."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import fx

from lora_fx.ops import aten, call_argument

SPLITS = {aten.split_with_sizes.default, aten.split.sizes}

_NOTHING: Mapping[fx.Node, fx.Node] = MappingProxyType({})


class Block(NamedTuple):
    """The outputs from start to end, exclusive."""

    start: int
    end: int


def block_of(
    value: Any, made: Mapping[fx.Node, fx.Node] = _NOTHING
) -> tuple[fx.Node | None, Block | None]:
    """The stored weight behind an operand, and which of its rows that is; None is all of them.

    Args:
        value: a layer's operand: a ``get_attr`` node, or one piece of such a node's split.
        made: operands that adapters made -> the stored weight below.

    Returns:
        The ``get_attr`` node, or None if it is something else.
    """
    if not isinstance(value, fx.Node):
        return None, None
    value = made.get(value, value)
    if value.op == "get_attr":
        return value, None
    if value.target is not operator.getitem:
        return None, None
    split, place = value.args
    if not isinstance(split, fx.Node) or split.target not in SPLITS or not isinstance(place, int):
        return None, None
    source = split.args[0]
    source = made.get(source, source) if isinstance(source, fx.Node) else None
    if source is None or source.op != "get_attr" or call_argument(split, 2, "dim", 0) != 0:
        return None, None
    sizes = call_argument(split, 1, "split_sizes")
    start = sum(sizes[:place])
    return source, Block(start, start + sizes[place])
