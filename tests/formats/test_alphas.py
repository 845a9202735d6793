"""An alpha gives back the scale that it was made for."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from lora_fx.formats.alphas import alpha_for

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
