"""Tensors by layer and role."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_fx.errors import AdapterError
from lora_fx.formats.pairs import (
    ALPHA,
    DOWN,
    UP,
    Layers,
    Roles,
    add,
    check_pairs,
    matrices_of,
    rank_of,
    scalar_of,
)

FILE = Path("a.safetensors")


def pair(down: tuple[int, ...] = (2, 3), up: tuple[int, ...] = (5, 2)) -> Roles:
    return {DOWN: ("fc.down", torch.ones(down)), UP: ("fc.up", torch.ones(up))}


def test_a_pair_is_found_by_path_and_role() -> None:
    layers: Layers = {}
    add(FILE, layers, "fc", DOWN, "fc.down", torch.ones(2, 3))
    add(FILE, layers, "fc", UP, "fc.up", torch.ones(5, 2))
    check_pairs(FILE, layers)
    assert rank_of(FILE, layers["fc"]) == 2
    assert [tuple(matrix.shape) for matrix in matrices_of(FILE, layers["fc"])] == [(2, 3), (5, 2)]


def test_a_role_that_is_taken_names_both_tensors() -> None:
    layers: Layers = {"fc": pair()}
    with pytest.raises(AdapterError, match=r"'fc.down' and 'fc_down' are both the down of fc"):
        add(FILE, layers, "fc", DOWN, "fc_down", torch.ones(2, 3))


@pytest.mark.parametrize("role", [DOWN, UP])
def test_half_of_a_pair_is_named(role: str) -> None:
    lonely = {role: pair()[role]}
    with pytest.raises(AdapterError, match=rf"half of a pair.*: fc\.{role}$"):
        check_pairs(FILE, {"other": pair(), "fc": lonely})


def test_no_pair_at_all_is_refused() -> None:
    with pytest.raises(AdapterError, match="nothing is adapted"):
        check_pairs(FILE, {})


@pytest.mark.parametrize(
    ("down", "up", "message"),
    [
        ((2, 3, 1, 1), (5, 2, 1, 1), r"'fc.down' is \(2, 3, 1, 1\) .* only linear layers"),
        ((2, 3), (5,), r"'fc.up' is \(5,\): only linear layers"),
        ((4, 3), (5, 2), r"\(4, 3\) and 'fc.up' is \(5, 2\): the ranks differ"),
    ],
)
def test_shapes_that_are_no_pair_are_refused(down: tuple[int, ...], up: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        rank_of(FILE, pair(down, up))


def test_an_alpha_is_one_number() -> None:
    assert scalar_of(FILE, pair()) is None
    for shape in ((), (1,)):
        assert scalar_of(FILE, {ALPHA: ("fc.alpha", torch.full(shape, 1.5))}) == 1.5
    with pytest.raises(AdapterError, match=r"'fc.alpha' is \(2,\), expected one number"):
        scalar_of(FILE, {ALPHA: ("fc.alpha", torch.ones(2))})
