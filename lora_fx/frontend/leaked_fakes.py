"""Fake tensors that a trace leaves in caches of the user's code."""

from __future__ import annotations

import gc
from functools import _lru_cache_wrapper
from typing import Any

from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree


def has_fakes(outputs: Any) -> bool:
    """Whether a call outside of any trace returned what only a trace makes."""
    return any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves(outputs))


def clear_caches() -> bool:
    """Clears each `functools.lru_cache` that keeps a tensor of a trace; whether there was one.

    Such a function, called for the first time while a model is traced, would give everyone who
    calls it later, the model itself included, a tensor without values.
    """
    is_frozen = gc.get_freeze_count() > 0  # of what is, nobody is told
    gc.unfreeze()
    # Not isinstance: some objects of torch warn when they are asked for their class.
    caches: list[Any] = [c for c in gc.get_objects() if type(c) is _lru_cache_wrapper]
    if is_frozen:
        gc.freeze()
    stale = [cache for cache in caches if _keeps_fakes(cache)]
    for cache in stale:
        cache.cache_clear()
    return bool(stale)


def _keeps_fakes(cache: Any) -> bool:
    """Looks through the results, and through tuples and lists of them."""
    own = {id(cache.__wrapped__), id(type(cache)), id(vars(cache))}
    pending, seen = [cache], set[int]()
    while pending:
        value = pending.pop()
        if isinstance(value, FakeTensor):
            return True
        if id(value) in seen or id(value) in own:
            continue
        seen.add(id(value))
        if value is cache or isinstance(value, dict | list | tuple) or _is_link(value):
            pending += gc.get_referents(value)
    return False


def _is_link(value: Any) -> bool:
    return type(value).__name__ == "_lru_list_elem"
