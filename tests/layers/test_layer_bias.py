from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_fx import trace
from lora_fx.layers.layer_bias import bias_of
from lora_fx.layers.sites import by_path
from lora_fx.testing import Computes


def layer(run: Any) -> nn.Module:
    function = lambda m, x: run(m, x, m.fc.weight, m.fc.bias)  # noqa: E731
    return Computes(function, {"b": (2,)}, fc=nn.Linear(5, 6))


def parts(m: Any, x: Any, w: Any, b: Any) -> Any:
    return F.linear(x, w[:2], b[:2]) + F.linear(x, w[2:4]) + F.linear(x, w[4:], m.b)


def inputs(m: Any, x: Any, w: Any, b: Any) -> Any:
    return F.linear(x[..., 2:], w[:, 2:], b) + F.linear(x[..., :2], w[:, :2], 2 * b)


CASES: dict[str, tuple[Any, Any]] = {
    "whole": (lambda m, x, w, b: F.linear(x, w, b), lambda m: m.fc.bias),
    "none": (lambda m, x, w, b: F.linear(x, w), None),
    "computed": (
        lambda m, x, w, b: F.linear(x, w, torch.cat([b[:4], m.b])),
        lambda m: torch.cat([m.fc.bias[:4], m.b]),
    ),
    "parts": (parts, lambda m: torch.cat([m.fc.bias[:2], torch.zeros(2), m.b])),
    "summed": (inputs, lambda m: 3 * m.fc.bias),
    "twice": (
        lambda m, x, w, b: F.linear(F.linear(x, w, b)[..., :5], w, b).sum() + parts(m, x, w, b),
        None,
    ),
    "of an activation": (lambda m, x, w, b: F.linear(x, w, b * x.sum()), None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_bias_is_put_together_of_what_the_calls_have(name: str) -> None:
    run, wanted = CASES[name]
    torch.manual_seed(0)
    model = layer(run).eval().requires_grad_(False)
    gm = trace(model, (torch.randn(3, 5),))
    found = bias_of(gm, by_path(gm)["fc"])
    if name == "twice":  # the whole call's and the parts' agree where both have one
        assert found is not None
        assert torch.equal(found[:2], model.fc.bias[:2])
    elif wanted is None:
        assert found is None
    else:
        assert found is not None
        torch.testing.assert_close(found, wanted(model))
