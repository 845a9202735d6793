"""Tensors by layer and role, and what is checked of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_fx.errors import AdapterError
from lora_fx.formats.dialects import (
    ALPHA,
    DOWN,
    MAGNITUDE,
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


def pair(down: tuple[int, ...] = (2, 3), up: tuple[int, ...] = (5, 2)) -> Roles:
    return {DOWN: ("fc.down", torch.ones(down)), UP: ("fc.up", torch.ones(up))}


def test_a_pair_is_found_by_path_and_role() -> None:
    layers: Layers = {}
    add(layers, "fc", DOWN, "fc.down", torch.ones(2, 3))
    add(layers, "fc", UP, "fc.up", torch.ones(5, 2))
    check_pairs(layers)
    assert [tuple(matrix.shape) for matrix in matrices_of(layers["fc"])] == [(2, 3), (5, 2)]


def test_a_role_that_is_taken_names_both_tensors() -> None:
    layers: Layers = {"fc": pair()}
    with pytest.raises(AdapterError, match=r"'fc.down' and 'fc_down' are both the down of fc"):
        add(layers, "fc", DOWN, "fc_down", torch.ones(2, 3))


@pytest.mark.parametrize("role", [DOWN, UP])
def test_half_of_a_pair_is_named(role: str) -> None:
    lonely = {role: pair()[role]}
    with pytest.raises(AdapterError, match=rf"half of a pair.*: fc\.{role}$"):
        check_pairs({"other": pair(), "fc": lonely})


def test_no_pair_at_all_is_refused() -> None:
    with pytest.raises(AdapterError, match="nothing is adapted"):
        check_pairs({})


def test_half_of_a_pair_is_named_whatever_stands_beside_it() -> None:
    check_no_half([pair() | {ALPHA: ("fc.alpha", torch.ones(()))}])
    with pytest.raises(AdapterError, match=r"half of a pair.*: fc\.up, fc\.alpha$"):
        check_no_half([{UP: pair()[UP], ALPHA: ("fc.alpha", torch.ones(()))}])


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
    assert magnitude_beside(found[0], torch.ones(5)).shape == (*one, 5, *kernel)


@pytest.mark.parametrize(
    ("down", "up", "message"),
    [
        ((2, 3), (5,), r"'fc.up' is \(5,\): expected \(r, in\) and"),
        ((2,), (5, 2), r"'fc.down' is \(2,\) .* of a convolution"),
        ((2, 3, 1, 1), (5, 2, 1), r"'fc.up' is \(5, 2, 1\): expected"),
        ((2, 3, 3, 3), (5, 2, 3, 3), r"'fc.up' is \(5, 2, 3, 3\): expected"),
        ((4, 3), (5, 2), r"\(4, 3\) and 'fc.up' is \(5, 2\): the ranks differ"),
        ((4, 3, 3), (5, 2, 1), "the ranks differ"),
    ],
)
def test_shapes_that_are_no_pair_are_refused(down: tuple[int, ...], up: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        factors_of(pair(down, up))


@pytest.mark.parametrize("kernels", [((1,), (1,)), ((1,), ()), ((), (1,))])
def test_matrices_have_no_kernel(kernels: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    down, up = (2, 3, *kernels[0]), (5, 2, *kernels[1])
    with pytest.raises(AdapterError, match=r"'fc.down' is .* expected matrices, \(r, in\)"):
        matrices_of(pair(down, up))


@pytest.mark.parametrize("kernel", [(), (3,), (3, 2)])
def test_a_magnitude_stands_beside_its_factors_on_the_output_axis(kernel: tuple[int, ...]) -> None:
    magnitude = torch.arange(5.0)
    found = magnitude_beside(torch.ones(2, 3, *kernel), magnitude)
    assert found.shape == ((1, 5, *[1] * len(kernel)) if kernel else (5,))
    assert torch.equal(found.flatten(), magnitude)


def roles(magnitude: int | None = None) -> Roles:
    more = {} if magnitude is None else {MAGNITUDE: ("fc.m", torch.ones(magnitude))}
    return pair() | more


def test_a_pair_of_a_rank_that_a_config_says_is_lora_or_dora() -> None:
    turned = {role: (key, tensor.T) for role, (key, tensor) in pair().items()}
    for own, is_turned in ((pair(), False), (turned, True)):
        update = lora_of(own, 2, 1.5, "r", None, is_turned)
        assert (update.shape, update.scale, update.kind) == ((5, 3), 1.5, "lora")
    assert lora_of(roles(5), 2, 1.5, "r", None).kind == "dora"


@pytest.mark.parametrize(
    ("own", "rank", "message"),
    [
        (pair(), 3, r"expected \(3, in\) and \(out, 3\), of the rank in r"),
        (pair((2, 3), (5, 3)), 2, r"'fc.up' is \(5, 3\), expected \(2, in\)"),
        (roles(3), 2, r"'fc.m' is \(3,\), expected \(5,\)"),
    ],
)
def test_another_rank_or_magnitude_is_refused(own: Roles, rank: int, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        lora_of(own, rank, 1.5, "r", None)


@pytest.mark.parametrize("down", [(4, 3), (3, 3, 3)])
def test_only_the_convolution_of_groups_divides_its_rank(down: tuple[int, ...]) -> None:
    with pytest.raises(AdapterError, match="the ranks differ"):
        factors_of(pair(down, (5, 2)), grouped=True)


def test_an_alpha_is_one_number() -> None:
    assert scalar_of(pair()) is None
    for shape in ((), (1,)):
        assert scalar_of({ALPHA: ("fc.alpha", torch.full(shape, 1.5))}) == 1.5
    with pytest.raises(AdapterError, match=r"'fc.alpha' is \(2,\), expected one number"):
        scalar_of({ALPHA: ("fc.alpha", torch.ones(2))})
