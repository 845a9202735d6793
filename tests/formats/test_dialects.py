"""Tensors by layer and role, and what is checked of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora_fx.errors import AdapterError
from lora_fx.formats.dialects import (
    ALPHA,
    DOWN,
    UP,
    Layers,
    Roles,
    add,
    check_no_half,
    check_pairs,
    factors_of,
    lora_of,
    magnitude_beside,
    matrices_of,
    scalar_of,
    up_beside,
)


def pair(down: tuple[int, ...] = (2, 3), up: tuple[int, ...] = (5, 2), **more: Any) -> Roles:
    shapes = {DOWN: down, UP: up, **more}
    return {role: (f"fc.{role}", torch.ones(shape)) for role, shape in shapes.items()}


def half(role: str, **more: Any) -> Roles:
    return {key: held for key, held in pair(**more).items() if key in (role, *more)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: add({"fc": pair()}, "fc", DOWN, "fc_down", torch.ones(2, 3)),
         r"'fc.down' and 'fc_down' are both the down of fc"),
        (lambda: check_pairs({}), "nothing is adapted"),
        *[
            (lambda role=role: check_pairs({"other": pair(), "fc": half(role)}),
             rf"half of a pair.*: fc\.{role}$")
            for role in (DOWN, UP)
        ],
        (lambda: check_no_half([half(UP, alpha=())]), r"half of a pair.*: fc\.up, fc\.alpha$"),
        (lambda: factors_of(pair((2, 3), (5,))), r"'fc.up' is \(5,\): expected \(r, in\) and"),
        (lambda: factors_of(pair((2,), (5, 2))), r"'fc.down' is \(2,\) .* of a convolution"),
        (lambda: factors_of(pair((2, 3, 1, 1), (5, 2, 1))), r"'fc.up' is \(5, 2, 1\): expected"),
        (lambda: factors_of(pair((2, 3, 3, 3), (5, 2, 3, 3))),
         r"'fc.up' is \(5, 2, 3, 3\): expected"),
        (lambda: factors_of(pair((4, 3))),
         r"\(4, 3\) and 'fc.up' is \(5, 2\): the ranks differ"),
        (lambda: factors_of(pair((4, 3, 3), (5, 2, 1))), "the ranks differ"),
        # only the convolution of groups divides its rank
        (lambda: factors_of(pair((4, 3)), grouped=True), "the ranks differ"),
        (lambda: factors_of(pair((3, 3, 3)), grouped=True), "the ranks differ"),
        *[
            (lambda down=down, up=up: matrices_of(pair(down, up)),
             r"'fc.down' is .* expected matrices, \(r, in\)")
            for down, up in (((2, 3, 1), (5, 2, 1)), ((2, 3, 1), (5, 2)), ((2, 3), (5, 2, 1)))
        ],
        (lambda: lora_of(pair(), 3, 1.5, "r", None),
         r"expected \(3, in\) and \(out, 3\), of the rank in r"),
        (lambda: lora_of(pair(up=(5, 3)), 2, 1.5, "r", None),
         r"'fc.up' is \(5, 3\), expected \(2, in\)"),
        (lambda: lora_of(pair(magnitude=(3,)), 2, 1.5, "r", None),
         r"'fc.magnitude' is \(3,\), expected \(5,\)"),
        (lambda: scalar_of(pair(alpha=(2,))), r"'fc.alpha' is \(2,\), expected one number"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused_by_name(
    call: Callable[[], object], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        call()


def test_a_pair_is_found_by_path_and_role() -> None:
    layers: Layers = {}
    add(layers, "fc", DOWN, "fc.down", torch.ones(2, 3))
    add(layers, "fc", UP, "fc.up", torch.ones(5, 2))
    check_pairs(layers)
    check_no_half([pair(alpha=())])
    assert [tuple(matrix.shape) for matrix in matrices_of(layers["fc"])] == [(2, 3), (5, 2)]


@pytest.mark.parametrize(
    ("down", "up", "grouped"),
    [
        ((2, 3), (5, 2), False),
        ((2, 3, 4), (5, 2, 1), False),
        ((2, 3, 4, 3), (5, 2, 1, 1), False),
        ((2, 3, 4, 3), (5, 2), False),
        ((4, 3, 4, 3), (5, 2, 1, 1), True),
    ],
)
def test_factors_are_of_a_linear_layer_or_a_convolution(
    down: tuple[int, ...], up: tuple[int, ...], grouped: bool
) -> None:
    found = factors_of(pair(down, up), grouped)
    assert [tuple(factor.shape) for factor in found] == [down, up[:2]]
    kernel = [1] * (len(down) - 2)
    assert up_beside(*found).shape == (*up[:2], *kernel)
    one = [1] if kernel else []  # as PEFT has it: (out,), or (1, out, 1, ...)
    magnitude = magnitude_beside(found[0], torch.arange(5.0))
    assert magnitude.shape == (*one, 5, *kernel)
    assert torch.equal(magnitude.flatten(), torch.arange(5.0))


def test_a_pair_of_a_rank_that_a_config_says_is_lora_or_dora() -> None:
    turned = {role: (key, tensor.T) for role, (key, tensor) in pair().items()}
    for own, is_turned in ((pair(), False), (turned, True)):
        update = lora_of(own, 2, 1.5, "r", None, is_turned)
        assert (update.shape, update.scale, update.kind) == ((5, 3), 1.5, "lora")
    assert lora_of(pair(magnitude=(5,)), 2, 1.5, "r", None).kind == "dora"


def test_an_alpha_is_one_number() -> None:
    assert scalar_of(pair()) is None
    for shape in ((), (1,)):
        assert scalar_of({ALPHA: ("fc.alpha", torch.full(shape, 1.5))}) == 1.5
