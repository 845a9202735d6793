"""Ranks, alphas and the scale that they mean; refusals are in the config's tests too."""

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_fx.adapters.scaling import alpha_for, checked_alpha, checked_rank, is_number, scale_of
from lora_fx.errors import AdapterError


def test_the_scale_is_alpha_over_the_rank_or_its_root() -> None:
    assert scale_of(6, 4, False) == 1.5
    assert scale_of(6, 4, True) == 3.0


def test_the_message_says_where() -> None:
    assert [checked_rank("r", rank) for rank in (1, 2)] == [1, 2]
    assert checked_alpha("alpha", -0.5) == -0.5
    with pytest.raises(AdapterError, match=r"^rank_pattern\['q'\] is 0, expected a positive"):
        checked_rank("rank_pattern['q']", 0)
    with pytest.raises(AdapterError, match=r"^alpha is '16', expected a finite number$"):
        checked_alpha("alpha", "16")


def test_a_number_is_finite_and_no_bool() -> None:
    largest = sys.float_info.max
    assert all(is_number(value) for value in (1, 0.5, largest, -largest))
    others = (True, "1", math.nan, math.inf, -math.inf, 10**400)
    assert not any(is_number(value) for value in others)


ALPHAS = st.floats(min_value=-1e6, max_value=1e6, allow_nan=False)


@given(ALPHAS, st.integers(1, 512))
def test_a_scale_made_by_the_same_division_comes_back_exactly(alpha: float, rank: int) -> None:
    for divisor in (rank, math.sqrt(rank)):
        scale = alpha / divisor
        assert alpha_for(scale, divisor) / divisor == scale


@given(st.integers(1, 4096), st.integers(1, 512))
def test_a_whole_alpha_stays_whole(alpha: int, rank: int) -> None:
    assert alpha_for(alpha / rank, rank) == alpha
    assert alpha_for(0.9 * alpha / rank, rank) != alpha
