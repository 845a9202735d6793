from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lora_fx.numerics import difference, same_values

Point = namedtuple("Point", "x y")


@dataclass
class Output:
    a: Any
    b: Any = None


X = torch.tensor([1.0, float("nan"), -2.0])


def test_values_are_equal_bit_for_bit_and_nan_is_itself() -> None:
    assert same_values(X, X.clone())
    assert same_values(X.to_sparse(), X.to_sparse())
    assert not same_values(X, X + 1e-7)
    assert not same_values(X, X.double())
    assert not same_values(X, X[None])
    assert not same_values(X, X.to_sparse())
    assert difference(float("nan"), float("nan")) is None


@pytest.mark.parametrize(
    "value", [X, (X, [X]), {"a": X}, Point(X, 1), Output(X, {"b": None}), None, 3, float("nan")]
)
def test_the_same_is_no_difference(value: Any) -> None:
    assert difference(value, value) is None


@pytest.mark.parametrize(
    ("found", "expected", "said"),
    [
        ({"y": (X, X)}, {"y": (X, X * 2)}, r"y\[1\] is off by 2"),
        ({"y": X.double()}, {"y": X}, "y is float64"),
        ({"y": [X]}, {"y": (X,)}, "y is a list, expected a tuple"),
        ({"y": {"a": X}}, {"y": {"b": X}}, "y has the parts"),
        ({"y": Output(X, 1)}, {"y": Output(X, 2)}, r"y\['b'\] is 1, expected 2"),
        ({"y": Point(X, 1)}, {"y": (X, 1)}, "y is a Point"),
        ({"y": 1}, {"y": True}, "y is a int, expected a bool"),
        ({"y": None}, {"y": X}, "y is a NoneType"),
        ({"y": float("nan")}, {"y": 3.0}, r"y is nan, expected 3\.0"),
        ({"y": 3.0}, {"y": float("nan")}, r"y is 3\.0, expected nan"),
    ],
)
def test_a_difference_says_where_and_what(found: Any, expected: Any, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(difference(found, expected))
