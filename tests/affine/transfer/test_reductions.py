"""What sums up features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lora_fx.testing import check_case, check_reason


def deep(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Thirty features on three axes."""
    return F.linear(m.low(x), torch.cat([m.v, m.v * 2, m.v * 3, m.v + 1, m.v - 1])).reshape(
        4, 7, 3, 2, 5
    )


CASES: dict[str, tuple[Any, ...]] = {
    "sum of all features": (lambda m, x: m.low(x).sum(-1, keepdim=True), "batch", "export"),
    "sum of blocks": (lambda m, x: m.split(x).sum(-2), "batch", "export"),
    "sum in blocks": (lambda m, x: m.split(x).sum(3), "batch", "export"),
    "sum of the axis between": (lambda m, x: deep(m, x).sum(-2), "batch", "export"),
    "sum of two axes": (lambda m, x: deep(m, x).sum((2, 4)), "batch", "export"),
    "sum of two axes, kept": (
        lambda m, x: deep(m, x).sum((-1, -3), keepdim=True),
        "batch",
        "export",
    ),
    "mean": (lambda m, x: deep(m, x).mean((-1, -2)), "batch", "export"),
    "sum of an input in blocks": (
        lambda m, x: F.linear(F.pad(x, (0, 1)).reshape(4, 7, 2, 2).sum(-2), m.up, m.b),
        "batch",
        "export",
    ),
}
OPAQUE: dict[str, tuple[Any, ...]] = {
    "sum of the batch": (lambda m, x: m.low(x).sum(0), "batch", "something else than features"),
    "sum of features and batch": (
        lambda m, x: m.low(x).sum((1, 2)),
        "batch",
        "something else than features",
    ),
    "sum of all": (lambda m, x: m.low(x).sum(), "batch", "something else than features"),
    "sum in integers": (
        lambda m, x: m.low(x).detach().sum(-1, dtype=torch.int64),
        "batch",
        "integers",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_sum_is_a_matrix(name: str) -> None:
    check_case(CASES[name], "export")


@pytest.mark.parametrize("name", OPAQUE)
def test_a_sum_of_something_else_says_why(name: str) -> None:
    check_reason(OPAQUE[name], "export")
