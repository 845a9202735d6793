"""Tensors by layer and role, and what is checked of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lora_fx.errors import AdapterError
from lora_fx.formats.dialects import ALPHA, Layers, add, check_adapted, scalar_of
from lora_fx.kinds.lora import DOWN, UP


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: add({"fc": {DOWN: ("fc.down", torch.ones(2, 3))}}, "fc", DOWN, "fc_down",
                     torch.ones(2, 3)),
         r"'fc.down' and 'fc_down' are both the down of fc"),
        (lambda: check_adapted({}), "nothing is adapted"),
        (lambda: scalar_of({ALPHA: ("fc.alpha", torch.ones(2))}),
         r"'fc.alpha' is \(2,\), expected one number"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused_by_name(
    call: Callable[[], object], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        call()


def test_a_tensor_is_found_by_path_and_role() -> None:
    layers: Layers = {}
    for role in (DOWN, UP):
        add(layers, "fc", role, f"fc.{role}", torch.ones(2, 2))
    check_adapted(layers)
    assert {role: key for role, (key, _) in layers["fc"].items()} == {
        DOWN: "fc.down",
        UP: "fc.up",
    }


def test_an_alpha_is_one_number() -> None:
    assert scalar_of({}) is None
    for shape in ((), (1,)):
        assert scalar_of({ALPHA: ("fc.alpha", torch.full(shape, 1.5))}) == 1.5
