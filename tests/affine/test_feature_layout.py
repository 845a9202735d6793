"""Where features are, against what torch does to a tensor that carries its own places."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_fx.affine.feature_layout import Layout, Turn
from lora_fx.graph.ops import same_sizes

SIZES = st.lists(st.integers(1, 4), max_size=2).map(tuple)
MORE = st.lists(st.integers(1, 4), max_size=4).map(tuple)
SOME = st.lists(st.integers(1, 4), min_size=1, max_size=2).map(tuple)


def numbered(layout: Layout) -> torch.Tensor:
    """A tensor whose elements say which row of the source's batch and which feature they are."""
    front = len(layout.batch or ()) - layout.after
    rows = torch.arange(prod(layout.batch or ()))
    for turn in layout.turns:
        stay = len(turn.sizes or ()) - len(turn.order)
        order = *range(stay), *(stay + axis for axis in turn.order)
        rows = rows.reshape(turn.sizes or ()).permute(order)
    rows = rows.reshape(layout.batch or ())
    features = torch.arange(prod(layout.split)).reshape(layout.split)
    rows = rows.reshape(*rows.shape[:front], *[1] * len(layout.split), *rows.shape[front:])
    features = features.reshape(*layout.split, *[1] * layout.after)
    whole = 1000 * rows + features
    return whole.reshape(-1, *layout.split[1:]) if layout.joined else whole


@settings(max_examples=300, deadline=None)
@given(SIZES, SOME, SIZES, st.lists(st.integers(1, 24), min_size=1, max_size=4))
def test_a_reshape_that_is_followed_keeps_every_element(
    front: Any, split: Any, behind: Any, sizes: list[int]
) -> None:
    layout = Layout(split, len(behind), (*front, *behind))
    tensor = numbered(layout)
    if tensor.numel() != prod(sizes):
        return
    found = layout.reshaped(tuple(sizes))
    if found is not None:
        assert torch.equal(tensor.reshape(sizes), numbered(found))


def test_the_batch_and_the_first_features_on_one_axis_are_told_apart_again() -> None:
    layout = Layout((12,), 0, (4, 7))
    joined = layout.reshaped((56, 3, 2))
    assert joined == Layout((2, 3, 2), 0, (4, 7), joined=True)
    assert torch.equal(numbered(layout).reshape(56, 3, 2), numbered(joined))
    assert (joined.axes, joined.sizes, joined.count) == (3, (56, 3, 2), 12)
    assert [joined.feature(axis) for axis in (0, 1, -1, -3)] == [None, 1, 2, None]
    assert [joined.gap(axis) for axis in (0, 1, -1)] == [None, 1, 3]
    assert joined.permuted([0, 2, 1]) is joined.swapped(1, 2) is None
    assert joined.column((3, 1))
    assert not joined.column((2, 3, 1))
    assert not joined.keeps((2, 3, 2), 0)
    assert not joined.same(Layout((2, 3, 2), 0, (4, 7)))
    assert joined.reshaped((4, 7, 12)) == layout
    assert joined.reshaped((28, 4, 3)) == Layout((4, 3), 0, (28,))
    assert joined.reshaped((56, 6)) == Layout((2, 6), 0, (4, 7), joined=True)
    assert layout.reshaped((4, 14, 6)) is layout.reshaped((8, 42)) is None


@settings(max_examples=300, deadline=None)
@given(SIZES, SOME, SIZES, st.data())
def test_a_permutation_that_is_followed_keeps_every_element(
    front: Any, split: Any, behind: Any, data: Any
) -> None:
    layout = Layout(split, len(behind), (*front, *behind))
    order = data.draw(st.permutations(range(layout.axes or 0)))
    found = layout.permuted(order)
    places = [place for place, axis in enumerate(order) if 0 <= axis - len(front) < len(split)]
    assert (found is None) == (places[-1] - places[0] >= len(split))
    if found is None:
        return
    moved, features = found
    tensor = numbered(layout).permute(order)
    index = torch.arange(prod(split)).reshape(split).permute(features).reshape(-1)
    assert torch.equal(tensor % 1000, index[numbered(moved) % 1000])
    assert torch.equal(tensor // 1000, numbered(moved) // 1000)


@settings(max_examples=300, deadline=None)
@given(SIZES, SOME, SIZES, st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple))
def test_an_axis_of_one_is_of_the_batch_or_of_the_features(
    front: Any, split: Any, behind: Any, wanted: Any
) -> None:
    layout = Layout(split, len(behind), (*front, *behind))
    seen = layout.seen_as(wanted)
    if seen is None:
        assert wanted != split
        return
    assert seen.keeps(wanted, len(behind))
    assert seen.sizes == layout.sizes
    assert torch.equal(numbered(seen), numbered(layout))


def test_axes_of_one_are_told_from_others() -> None:
    layout = Layout((5,), 0, (4, 1, 1))
    assert layout.seen_as((1, 5)) == Layout((1, 5), 0, (4, 1))
    assert layout.seen_as((1, 1, 5)) == Layout((1, 1, 5), 0, (4,))
    assert layout.seen_as((4, 1, 1, 5)) is layout.seen_as((1, 1, 1, 5)) is None
    assert Layout((1, 5), 1, (4, 3)).seen_as((5,)) == Layout((5,), 1, (4, 1, 3))
    assert Layout((2, 5), 0, (4,)).seen_as((5,)) is Layout((5,)).seen_as((1, 5)) is None
    assert Layout((5,), 0, (4, 1, 3)).turned((2, 1, 0)).turns == (Turn((4, 3), (1, 0)),)
    assert layout.turned((1, 0)).turns == layout.turned((1, 0, 2)).turns == ()


@settings(max_examples=300, deadline=None)
@given(st.permutations(range(3)), st.permutations(range(3)), st.booleans())
def test_batches_that_turn_line_up_where_their_rows_do(
    one: list[int], other: list[int], is_reshaped: bool
) -> None:
    layout = Layout((5,), 0, (2, 3, 4)).turned(tuple(one))
    if is_reshaped:
        layout = layout.reshaped((6, 4, 5))  # type: ignore[assignment]
        layout = layout and layout.reshaped((2, 3, 4, 5))
    turned = layout.turned(tuple(other))
    assert torch.equal(numbered(layout).permute(*other, 3), numbered(turned))
    back = turned.turned(tuple(sorted(range(3), key=lambda place: other[place])))
    assert back.same(layout)
    assert turned.same(layout) == (other == sorted(other))
    cube = Layout((5,), 0, (3, 3, 3))  # whose sizes say nothing
    assert cube.turned(tuple(one)).same(cube.turned(tuple(other))) == (one == other)
    if not is_reshaped:
        assert len(turned.turns) <= 1


@settings(max_examples=600, deadline=None)
@given(SIZES, SOME, MORE, MORE)
@example((4,), (4,), (3, 4, 5), (4, 1))
@example((2,), (3,), (), (1, 3))
def test_a_column_is_what_is_the_same_for_every_row_of_the_batch(
    front: Any, split: Any, behind: Any, shape: Any
) -> None:
    layout = Layout(split, len(behind), (*front, *behind))
    sizes = layout.sizes or ()
    try:
        values = torch.randn(shape).expand(sizes)
    except RuntimeError:
        assert not layout.column(shape)
        return
    own = tuple(range(len(front), len(front) + len(split)))
    rows = values.movedim(own, tuple(range(len(split)))).reshape(prod(split), -1)
    assert layout.column(shape) == torch.equal(rows, rows[:, :1].expand_as(rows))


def test_features_are_told_by_either_sign() -> None:
    layout = Layout((6, 4), 1, (2, 3, 5))
    assert [layout.feature(axis) for axis in range(5)] == [None, None, 0, 1, None]
    assert [layout.feature(axis) for axis in range(-5, 0)] == [None, None, 0, 1, None]
    assert Layout((6,)).feature(-1) == 0
    assert Layout((6,)).feature(2) is None  # how many axes there are is not known


@pytest.mark.parametrize(
    ("sizes", "split"),
    [((2, 15, 6), (6,)), ((30, 6), (6,)), ((2, 3, 5, 2, 3), (2, 3)), ((2, 3, 30), None)],
)
def test_what_reshapes_do(sizes: Any, split: Any) -> None:
    found = Layout((6,), 0, (2, 3, 5)).reshaped(sizes)
    assert (found.split if found else None) == split


def test_unknown_sizes_are_the_sources_own() -> None:
    assert Layout((6,)).same(Layout((6,)))
    assert not Layout((6,)).same(Layout((6,), 0, (2,)))
    assert not Layout((6,), 1).same(Layout((6,)))
    assert Layout((6,)).reshaped((2, 6)) is None
    assert not same_sizes((2, 3), (2,))
    assert not same_sizes((2, 3), (3, 2))
