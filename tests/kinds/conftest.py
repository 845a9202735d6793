from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def noise() -> Callable[..., torch.Tensor]:
    """Numbers of a shape, other ones at every call."""
    make = torch.Generator().manual_seed(11)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=make).to(dtype)

    return draw
