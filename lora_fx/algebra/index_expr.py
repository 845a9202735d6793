"""Index expressions: which rows of a matrix, computed when needed."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from math import prod

import torch


@dataclass(frozen=True)
class Index:
    """Distinct places along an axis.

    Attributes:
        key: two of one key are equal.
        count: how many.
        places: makes them, as a tensor of int64.
    """

    key: Hashable
    count: int
    places: Callable[[], torch.Tensor] = field(compare=False)


def slice_of(size: int, cut: slice) -> Index:
    """What Python's slice picks of an axis."""
    steps = range(*cut.indices(size))
    key = ("slice", steps.start, steps.stop, steps.step)
    return Index(key, len(steps), lambda: torch.tensor(list(steps), dtype=torch.int64))


def listed(places: torch.Tensor) -> Index | None:
    """Places as they are given, or None if one is there twice; what a slice picks is that slice."""
    first, count = int(places[0]) if len(places) else 0, len(places)
    step = int(places[1]) - first if count > 1 else 1
    even = torch.arange(count) * step + first
    if step and torch.equal(places, even):
        key: Hashable = ("slice", first, first + count * step, step)
    elif len(set(places.tolist())) < count:
        return None
    else:
        key = ("places", places.numpy().tobytes())
    return Index(key, count, lambda: places)


def then(first: Index, second: Index) -> Index:
    """What a second index picks of what the first has picked."""
    key = ("then", first.key, second.key)
    return Index(key, second.count, lambda: first.places()[second.places()])


def all_but(size: int, index: Index) -> Index:
    """The places of an axis that another index leaves out, in order."""

    def places() -> torch.Tensor:
        free = torch.ones(size, dtype=torch.bool)
        free[index.places()] = False
        return free.nonzero().reshape(-1)

    return Index(("all but", size, index.key), size - index.count, places)


def along(axis: int, split: tuple[int, ...], index: Index) -> Index:
    """An index of one feature axis, as an index of all features in row-major order."""

    def places() -> torch.Tensor:
        grid = torch.arange(prod(split)).reshape(split)
        return grid.index_select(axis, index.places()).reshape(-1)

    count = index.count * prod(split) // max(split[axis], 1)
    return Index(("along", axis, split, index.key), count, places)


def reordered(split: tuple[int, ...], order: tuple[int, ...]) -> Index:
    """What a permutation of the feature axes does to all features in row-major order."""

    def places() -> torch.Tensor:
        return torch.arange(prod(split)).reshape(split).permute(order).reshape(-1)

    return Index(("reordered", split, order), prod(split), places)
