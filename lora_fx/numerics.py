"""The judge: whether two tensors agree, by one table of tolerances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# Largest relative error, ||actual - expected|| / ||expected||, that counts as agreement. Honest
# rounding is 10 to 30 times below each entry, and a scale off by 10 % at least 10 times above.
TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}

_PIECE = 1 << 20  # numbers that are compared at a time


@dataclass(frozen=True)
class Comparison:
    """How far two tensors are apart.

    Attributes:
        max_abs: the largest absolute difference.
        relative: norm of the difference over the norm of what was expected.
        tolerance: the relative error that is allowed.
    """

    max_abs: float
    relative: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether they agree; NaN never does."""
        return self.relative <= self.tolerance

    def __str__(self) -> str:
        """One line for a log."""
        return (
            f"relative {self.relative:.2e} (allowed {self.tolerance:.0e}), max {self.max_abs:.2e}"
        )


def compare(actual: Any, expected: Any, dtype: torch.dtype | None = None) -> Comparison:
    """Compares two tensors or arrays of one shape.

    Args:
        actual: what was computed.
        expected: what it should be.
        dtype: the precision that the computation ran in; ``expected``'s by default. Integers and
            booleans must be equal.

    Returns:
        The distance and the tolerance. A wrong shape or a NaN on one side is infinitely far, and
        so is what holds no finite number at all: that says nothing.
    """
    left, right = torch.as_tensor(actual).detach().cpu(), torch.as_tensor(expected).detach().cpu()
    tolerance = TOLERANCE.get(dtype or right.dtype, 0.0)
    if left.shape != right.shape:
        return Comparison(float("inf"), float("inf"), tolerance)
    # In pieces: as a whole, large outputs would take eight times their memory on the way.
    left, right = left.reshape(-1), right.reshape(-1)
    starts = range(0, max(left.numel(), 1), _PIECE)
    parts = torch.stack([_distance(left[i : i + _PIECE], right[i : i + _PIECE]) for i in starts])
    gap, size = parts[:, :2].sum(0).sqrt().tolist()
    max_abs = parts[:, 2].max().item()
    if right.numel() and not bool(parts[:, 3].any()):
        return Comparison(float("inf"), float("inf"), tolerance)
    if max_abs == 0.0:
        return Comparison(0.0, 0.0, tolerance)
    return Comparison(max_abs, gap / size if size > 0 else float("inf"), tolerance)


def _distance(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Squares of the distance and of the expected size, the largest distance; is any finite?"""
    size = right.double()
    gap = left.double() - size
    if not gap.numel():
        return gap.new_zeros(4)
    told = gap.new_ones(())
    low, high = gap.aminmax()
    if not (low.isfinite() and high.isfinite()):
        # Masked logits hold infinities on both sides; equal ones carry no information.
        same = (left == right) | (left.isnan() & right.isnan())
        gap = gap.masked_fill(same, 0.0)
        size = size.masked_fill(same & ~right.isfinite(), 0.0)
        low, high = gap.aminmax()
        told = right.isfinite().any().double()
    return torch.stack([gap.dot(gap), size.dot(size), torch.maximum(-low, high), told])
