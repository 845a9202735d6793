"""Module paths of sites: of the module that holds the weight, or the weight's own name."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

# Of nn.MultiheadAttention, which calls a layer of its own on each of them.
PACKED = "in_proj_weight"  # query, key and value in one
_APART = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_INNER = ".out_proj"
# With the number that a new weight has while the old one is read elsewhere.
_PACKED = re.compile(rf"\.{PACKED}(_\d+)?$")
_NUMBERED = re.compile(r"weight_\d+$")


def is_packed(name: str) -> bool:
    """Whether a weight is the projection of an attention module that packs three in one."""
    return bool(_PACKED.search(name))


def paths_of(calls: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Names layers by the calls of a graph.

    A module that owns several weights (an attention module) has a layer for each, told apart by
    the weight's own name; the packed projection is called as the module is, and what belongs to a
    module further down is called as that is, whoever calls it.

    Args:
        calls: the path of the module that calls, and the name of the weight, each.

    Returns:
        Each of these -> the path of the layer.
    """
    weights: dict[str, set[str]] = defaultdict(set)
    for path, name in calls:
        weights[path].add(name)
    alone = {path for path, names in weights.items() if path and len(names) == 1}
    return {
        (path, name): _path(path, name, names, alone)
        for path, names in weights.items()
        for name in names
    }


def _path(path: str, name: str, names: set[str], alone: set[str]) -> str:
    holder, _, leaf = name.rpartition(".")
    if path and not name.startswith(f"{path}."):  # a tied weight bears another module's name
        attends = any(other.rpartition(".")[2] in (PACKED, *_APART) for other in names)
        if attends and holder.endswith(_INNER):
            return path + _INNER
        is_own = path in alone and leaf.startswith("weight")
        return path if is_own or leaf == PACKED else f"{path}.{leaf}"
    if is_packed(name):
        return holder
    is_inner = leaf == "weight" or _NUMBERED.match(leaf)
    if path in alone and leaf.startswith("weight") and (holder == path or not is_inner):
        return path
    siblings = [other for other in names if other.rpartition(".")[0] == holder]
    if _NUMBERED.match(leaf) and holder != path and len(siblings) == 1:
        return holder
    owner = name.removesuffix(".weight")
    return name if owner in alone else owner
