from __future__ import annotations

import pytest
import torch

from lora_fx import numerics
from lora_fx.errors import LoraFxError
from lora_fx.numerics import TOLERANCE, compare

MAKE = torch.Generator().manual_seed(0)
VALUES = torch.randn(5, 3, generator=MAKE)


def test_equal_tensors_agree_and_the_distance_is_relative() -> None:
    assert compare(VALUES, VALUES).relative == 0
    assert compare(1.1 * VALUES, VALUES).relative == pytest.approx(0.1, rel=1e-5)
    assert compare(VALUES + 2, VALUES).max_abs == pytest.approx(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_honest_rounding_passes_and_a_tenth_off_fails(dtype: torch.dtype) -> None:
    rounded = VALUES.to(dtype)
    assert compare(rounded, VALUES, dtype).ok
    assert not compare(1.1 * rounded, VALUES, dtype).ok
    assert compare(rounded, VALUES, dtype).tolerance == TOLERANCE[dtype]


@pytest.mark.parametrize(
    "actual", [VALUES[:, :2], torch.full((5, 3), float("nan")), torch.full((5, 3), float("inf"))]
)
def test_another_shape_nan_and_infinity_never_agree(actual: torch.Tensor) -> None:
    assert not compare(actual, VALUES).ok


def test_numbers_are_compared_however_they_are_held() -> None:
    turned = torch.complex(VALUES, VALUES)
    assert compare(turned, turned).ok
    assert not compare(torch.complex(VALUES, 1.1 * VALUES), turned).ok
    assert compare(VALUES.to_sparse(), VALUES.numpy()).ok
    assert not compare(1.1 * VALUES.to_sparse(), VALUES.numpy()).ok


@pytest.mark.parametrize("wrong", [None, "x", {}, [VALUES, VALUES[:1]], torch.nn.Linear(3, 5)])
def test_what_holds_no_numbers_is_refused_by_its_type(wrong: object) -> None:
    kind = type(wrong).__name__
    with pytest.raises(LoraFxError, match=rf"^actual is a {kind}: compare takes .*: give one"):
        compare(wrong, VALUES)
    with pytest.raises(LoraFxError, match=rf"^expected is a {kind}: compare takes"):
        compare(VALUES, wrong)


def test_a_precision_is_one_of_torchs() -> None:
    with pytest.raises(LoraFxError, match=r"^dtype is 'float16': give one of torch's"):
        compare(VALUES, VALUES, "float16")  # type: ignore[arg-type]


def test_equal_infinities_carry_no_information() -> None:
    masked = VALUES.clone()
    masked[0, 0] = float("-inf")
    assert compare(masked, masked).ok
    off = masked.clone()
    off[1] *= 1.1
    assert not compare(off, masked).ok


def test_integers_must_be_equal_and_zero_is_only_zero() -> None:
    assert compare(torch.tensor([1, 2]), torch.tensor([1, 2])).ok
    assert not compare(torch.tensor([1, 3]), torch.tensor([1, 2])).ok
    assert not compare(torch.tensor([1e-9]), torch.tensor([0.0])).ok
    assert compare(torch.zeros(0), torch.zeros(0)).ok


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_holds_no_finite_number_proves_nothing(value: float) -> None:
    empty = torch.full((5, 3), value)
    assert not compare(empty, empty).ok
    empty[4, 2] = 1.0
    assert compare(empty, empty).ok


@pytest.mark.parametrize("place", [0, 7, 13, 14])
def test_what_is_compared_in_pieces_is_compared_to_the_end(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compare(VALUES * 2, VALUES)
    monkeypatch.setattr(numerics, "_PIECE", 4)
    assert compare(VALUES * 2, VALUES).relative == pytest.approx(whole.relative)
    off = VALUES.clone()
    off.view(-1)[place] += 0.5
    found = compare(off, VALUES)
    assert not found.ok
    assert found.max_abs == pytest.approx(0.5)
    assert found.relative == pytest.approx(0.5 / float(VALUES.norm()))
    only = torch.full((15,), float("nan"))
    only[place] = 1.0
    assert compare(only, only).ok, "one number of them tells"
