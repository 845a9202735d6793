"""Names of an adapter's parameters in a graph, whatever the adapter is called."""

from __future__ import annotations

import keyword
from functools import lru_cache

from torch import nn


def part_of(name: str) -> str:
    """What tensors are called by: ``is`` becomes ``is_``, because Python cannot say ``x.is``.

    So do names that every module has already (``train``, ``half``), and what would be read back
    as one of these (``is_`` becomes ``is__``).
    """
    return f"{name}_" if _is_taken(name) else name


def name_in(target: str) -> str:
    """The adapter's name out of the name of one of its tensors: what `part_of` made of it."""
    part = target.rpartition(".")[2]
    return part[:-1] if part.endswith("_") and _is_taken(part[:-1]) else part


@lru_cache(maxsize=1024)
def _is_taken(name: str) -> bool:
    """Whether a name is taken, or is a taken one with underscores behind it."""
    shorter = [name[:end] for end in range(len(name.rstrip("_")), len(name) + 1)]
    return any(keyword.iskeyword(w) or hasattr(nn.Module, w) or w in _OWN for w in shorter)


_OWN = frozenset(vars(nn.Module()))  # what only an instance has: training, _parameters, ...
