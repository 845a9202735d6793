"""How the source of a region comes to the layer that stands for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lora_fx import trace
from lora_fx.passes import FoldLora
from lora_fx.testing import Computes, check_pass

SIZES = {"a": (3, 2), "b": (2, 3), "w": (5, 3), "bias": (5,), "gain": (3,)}
BEFORE: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "a sum with what the source gives": (
        lambda m, x: F.linear(2 * (x + x @ m.a @ m.b), m.w, m.bias),
        ["linear = linear(x, w, w_2)"],
    ),
    "a sum of what is moved": (
        lambda m, x: F.linear((x + x @ m.a @ m.b).view(2, 2, 3) * 2, m.w, m.bias),
        ["view = view(x, [2, 2, 3])", "linear = linear(view, w, w_2)"],
    ),
    "a number, in another type": (
        lambda m, x: F.linear((x * 2).to(torch.float64) * 3, m.wide),
        ["to = to(x, torch.float64)", "linear = linear(to, wide)"],
    ),
}


@pytest.mark.parametrize("name", BEFORE)
def test_what_is_in_front_of_a_layer_is_in_its_weight(name: str) -> None:
    function, lines = BEFORE[name]
    wide = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    model, x = Computes(function, SIZES, wide=wide), torch.randn(4, 3)
    gm = trace(model, (x,), frontend="export")
    seen = check_pass(FoldLora(), gm, x, expected=model(x), control=1.1 * model(x))
    assert seen.after.splitlines()[1:-1] == lines


@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
def test_a_source_of_another_type_than_the_layer_stays_apart(kind: torch.dtype) -> None:
    """A product with a wider constant is what widens it: nothing else would."""
    model = Computes(lambda m, x: F.linear(x * m.gain, m.w), SIZES)
    x = torch.randn(4, 3, dtype=kind)
    result = FoldLora()(trace(model, (x,), frontend="export"))
    assert result.modified == (kind is torch.float32)
    torch.testing.assert_close(result.graph_module(x), model(x))
