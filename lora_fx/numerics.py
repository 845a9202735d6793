"""The judge: whether two tensors agree, by one table of tolerances."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lora_fx.choices import takes
from lora_fx.errors import LoraFxError, is_out_of_memory

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


@takes(LoraFxError)
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

    Raises:
        LoraFxError: one of them is no tensor, no array and no number.
    """
    if not isinstance(dtype, torch.dtype | None):
        raise LoraFxError(f"dtype is {dtype!r:.80}: give one of torch's, such as torch.float16")
    left, right = _numbers("actual", actual), _numbers("expected", expected)
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


def _numbers(name: str, value: Any) -> torch.Tensor:
    try:
        found = torch.as_tensor(value).detach().cpu()
        found = found.dequantize() if found.is_quantized else found.to_dense()
        if found.is_nested:
            raise TypeError("no one shape")
    except (TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise LoraFxError(
            f"{name} is a {type(value).__name__}: compare takes two plain tensors or arrays of "
            "numbers: give one output after the other"
        ) from error
    return torch.view_as_real(found) if found.is_complex() else found


def _distance(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Squares of the distance and of the expected size, the largest distance; is any finite?"""
    size = right.double()
    gap = left.double() - size
    if not gap.numel():
        return gap.new_zeros(4)
    told = gap.new_ones(())
    low, high = gap.aminmax()
    if not (high - low).isfinite():
        # Masked logits hold infinities on both sides; equal ones carry no information.
        same = (left == right) | (left.isnan() & right.isnan())
        gap = gap.masked_fill(same, 0.0)
        size = size.masked_fill(same & ~right.isfinite(), 0.0)
        low, high = gap.aminmax()
        told = right.isfinite().any().double()
    return torch.stack([gap.dot(gap), size.dot(size), torch.maximum(-low, high), told])


def coarsest(dtypes: Iterable[torch.dtype | None]) -> torch.dtype:
    """Of those with a tolerance the one that rounds most; float32 if there is none."""
    found = (dtype for dtype in dtypes if dtype is not None and dtype in TOLERANCE)
    return max(found, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32 or wider: what a product is computed in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have one dtype, shape and layout, and equal numbers; NaN equals NaN."""
    kinds = [(t.dtype, t.shape, t.layout, t.device) for t in (one, other)]
    if kinds[0] != kinds[1]:
        return False
    one, other = (t.detach() for t in (one, other))
    if one.layout is not torch.strided:
        one, other = one.to_dense(), other.to_dense()
    if torch.equal(one, other):
        return True
    if not (one.is_floating_point() or one.is_complex()):
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def equal_numbers(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have one shape and equal numbers, in whatever dtypes."""
    wide = torch.promote_types(one.dtype, other.dtype)
    return one is other or (one.shape == other.shape and torch.equal(one.to(wide), other.to(wide)))


def difference(found: Any, expected: Any, at: str = "") -> str | None:
    """Says where and how two results differ first, or None.

    Tensors are compared by `same_values`, containers and dataclasses by their parts, whatever
    else pytree knows by its leaves, and the rest by ``==``.
    """
    if isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor):
        return None if same_values(found, expected) else _gap(found, expected, at)
    if type(found) is not type(expected):
        return f"{at} is a {type(found).__name__}, expected a {type(expected).__name__}"
    parts = [_parts(value) for value in (found, expected)]
    if parts[1] is None or parts[0] is None:
        return None if _equal(found, expected) else f"{at} is {found!r}, expected {expected!r}"
    if list(parts[0]) != list(parts[1]):
        return f"{at} has the parts {list(parts[0])}, expected {list(parts[1])}"
    pairs = ((key, parts[0][key], parts[1][key]) for key in parts[1])
    found_one = (difference(a, b, f"{at}[{key!r}]" if at else str(key)) for key, a, b in pairs)
    return next((said for said in found_one if said), None)


def _parts(value: Any) -> Mapping[Any, Any] | None:
    """The parts of a value by key; None if it has none."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if is_dataclass(value):
        return {item.name: getattr(value, item.name) for item in fields(value)}
    leaves, spec = pytree.tree_flatten(value)
    if not spec.is_leaf():
        return dict(enumerate(leaves))
    own = getattr(value, "__dict__", None)
    return own if getattr(type(value), "__eq__", None) is object.__eq__ and own else None


def _equal(found: Any, expected: Any) -> bool:
    return found is expected or bool(found == expected) or (found != found and expected != expected)


def _gap(found: torch.Tensor, expected: torch.Tensor, at: str) -> str:
    said = [f"{t.dtype} {tuple(t.shape)}".removeprefix("torch.") for t in (found, expected)]
    if said[0] != said[1]:
        return f"{at} is {said[0]}, expected {said[1]}"
    if found.layout is not expected.layout:
        return f"{at} is {found.layout}, expected {expected.layout}"
    if found.is_complex():
        found, expected = torch.view_as_real(found), torch.view_as_real(expected)
    one, other = (t.detach().to_dense().double() for t in (found, expected))
    same = (one == other) | (one.isnan() & other.isnan())
    gap = (one - other).abs().masked_fill(same, 0.0).nan_to_num(nan=float("inf"))
    largest = gap.max().item()
    return f"{at} is off by {largest:.2g}"
