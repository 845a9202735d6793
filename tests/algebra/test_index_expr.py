from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_fx.algebra.index_expr import (
    Index,
    all_but,
    along,
    listed,
    reordered,
    slice_of,
    then,
)

EDGES = st.one_of(st.none(), st.integers(-8, 8))


@settings(deadline=None)
@given(st.integers(1, 7), EDGES, EDGES, st.one_of(st.none(), st.integers(1, 3)))
def test_a_slice_picks_what_pythons_does(size: int, start: int, stop: int, step: int) -> None:
    cut = slice(start, stop, step)
    index = slice_of(size, cut)
    wanted = torch.arange(size)[cut]
    assert torch.equal(index.places(), wanted)
    assert index.count == len(wanted)
    rest = all_but(size, index)
    assert rest.count == size - index.count
    assert sorted([*index.places().tolist(), *rest.places().tolist()]) == list(range(size))


@settings(deadline=None)
@given(st.permutations((2, 3, 4)), st.integers(0, 2), st.permutations((0, 1, 2)))
def test_indices_of_one_axis_and_permutations_are_those_of_the_tensor(
    split: list[int], axis: int, order: list[int]
) -> None:
    value = torch.randn(split, generator=torch.Generator().manual_seed(0))
    picked = along(axis, tuple(split), slice_of(split[axis], slice(1, None)))
    wanted = value.index_select(axis, torch.arange(1, split[axis])).reshape(-1)
    assert torch.equal(value.reshape(-1)[picked.places()], wanted)
    assert picked.count == len(wanted)
    moved = reordered(tuple(split), tuple(order))
    assert torch.equal(value.reshape(-1)[moved.places()], value.permute(order).reshape(-1))
    back = value.permute(order[::-1]).reshape(-1)
    assert not torch.equal(value.reshape(-1)[moved.places()], back)


def test_indices_of_one_key_are_equal() -> None:
    assert slice_of(5, slice(1, 4)) == slice_of(5, slice(-4, -1))
    assert slice_of(5, slice(1, 4)) != slice_of(5, slice(0, 3))
    assert all_but(5, slice_of(5, slice(1, 4))) != slice_of(5, slice(1, 4))
    assert Index("a", 1, lambda: torch.zeros(1)) == Index("a", 1, lambda: torch.ones(1))


@given(st.lists(st.integers(0, 6), max_size=7), st.integers(0, 3), st.integers(0, 7))
def test_places_are_listed_as_they_are_and_never_twice(
    places: list[int], start: int, stop: int
) -> None:
    given_places = torch.tensor(places, dtype=torch.int64)
    index = listed(given_places)
    assert (index is None) == (len(set(places)) < len(places))
    if index is not None:
        second = slice_of(len(places), slice(start, stop))
        assert index.count == len(places)
        assert then(index, second).places().tolist() == places[start:stop]
        assert then(index, second).count == len(places[start:stop])
        assert listed(given_places.flip(0)) == index or len(places) > 1


def test_what_a_slice_picks_is_that_slice() -> None:
    assert listed(torch.tensor([1, 2, 3])) == slice_of(5, slice(1, 4))
    assert listed(torch.tensor([1, 3])) == slice_of(5, slice(1, None, 2))
    assert listed(torch.tensor([1, 3, 2])) != listed(torch.tensor([1, 2, 3]))
    assert listed(torch.tensor([1, 3, 2])) == listed(torch.tensor([1, 3, 2]))
