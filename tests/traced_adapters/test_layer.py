"""What one layer of PEFT's computes, as an update; or why it is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_fx.adapters.other_updates import WeightUpdate
from lora_fx.adapters.updates import Update
from lora_fx.errors import AdapterError, TraceError
from lora_fx.layers.layer import layer_of
from lora_fx.testing import relative
from lora_fx.traced_adapters.layer import update_of
from lora_fx.traced_adapters.traces import Traces


class Wraps(nn.Module):
    """A layer of somebody's around a base layer."""

    def __init__(self, function: Any, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base_layer = nn.Linear(3, 5, **options)
        self.up, self.down = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(2, 3))
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def read(layer: Wraps) -> Any:
    base = layer_of(layer.base_layer)
    assert base is not None
    own = {name: p.detach() for name, p in layer.base_layer.named_parameters()}
    return update_of(layer.eval(), base, own, "mine", Traces())


def test_a_product_is_an_update_of_its_rank() -> None:
    layer = Wraps(lambda m, x: m.base_layer(x) + x @ m.down.T @ m.up.T * 2)
    update = read(layer)
    assert isinstance(update, Update)
    assert (update.rank, update.kind, update.bias) == (2, "mine", None)
    wanted = layer.base_layer.weight + 2 * layer.up @ layer.down
    assert relative(update.weight(layer.base_layer.weight), wanted) <= 1e-6


def test_an_expression_in_w_is_good_for_another_w() -> None:
    layer = Wraps(lambda m, x: m.base_layer(x) * m.up[:, 0])
    update, other = read(layer), torch.randn(5, 3)
    assert isinstance(update, WeightUpdate)
    assert relative(update.weight(other), other * layer.up[:, :1]) <= 1e-6
    assert relative(update.bias, layer.base_layer.bias * (layer.up[:, 0] - 1)) <= 1e-6
    assert relative(update.weight(other), other) > 1e-2


def test_what_is_no_expression_in_w_is_a_difference() -> None:
    layer = Wraps(lambda m, x: F.linear(x, m.base_layer.weight.sin(), m.base_layer.bias))
    update, weight = read(layer), layer.base_layer.weight
    assert relative(update.weight(weight), weight.sin()) <= 1e-6
    assert relative(update.weight(weight + 1), weight.sin() + 1) <= 1e-6
    assert relative(update.weight(weight), weight) > 1e-2


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_bias_that_is_added_is_one(has_bias: bool) -> None:
    layer = Wraps(lambda m, x: m.base_layer(x) + m.up[:, 0], bias=has_bias)
    update = read(layer)
    assert relative(update.bias, layer.up[:, 0]) <= 1e-6


def test_what_was_written_into_its_copy_of_w_is_a_part_of_the_update() -> None:
    layer = Wraps(lambda m, x: m.base_layer(x) + x @ m.down.T @ m.up.T)
    own = {name: p.detach().clone() for name, p in layer.base_layer.named_parameters()}
    layer.base_layer.weight = nn.Parameter(own["weight"] * 0.5)
    base: Any = layer_of(layer.base_layer)
    found = update_of(layer.eval(), base, own, "mine", Traces()).weight(own["weight"])
    assert relative(found, own["weight"] * 0.5 + layer.up @ layer.down) <= 1e-6


def scaled_if(asked: Any) -> Any:
    return lambda m, x: m.base_layer(x) + x @ m.down.T @ m.up.T * (2 if asked(m) else 3)


ASKED: dict[str, Any] = {
    "a comparison": lambda m: m.up.norm() > 1.0,
    "its other side": lambda m: m.up.norm() > 100.0,
    "two": lambda m: torch.isfinite(m.up.norm()) and m.down.norm() < 0,
    "a number": lambda m: m.up.norm().item() > 1.0,
    "a whole number": lambda m: int(m.up.norm()) > 100,
    "a float": lambda m: float(m.up.detach().sum()) != 0.0,
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_a_branch_on_values_of_its_own_is_taken_as_it_is_when_it_runs(asked: Any) -> None:
    layer = Wraps(scaled_if(asked))
    update, scale = read(layer), 2 if asked(layer) else 3
    wanted = layer.base_layer.weight + scale * layer.up @ layer.down
    assert relative(update.weight(layer.base_layer.weight), wanted) <= 1e-6
    assert relative(update.weight(layer.base_layer.weight), wanted + layer.up @ layer.down) > 1e-2
    assert "forward" not in vars(layer)


BY_INPUT: dict[str, Any] = {
    "as it is": lambda m, x: m.base_layer(x) * (2 if x.sum() > 1e9 else 3),
    "behind a cast": lambda m, x: m.base_layer(x) * (2 if x.to(m.up.dtype).max() > 1e9 else 3),
    "behind the layer": lambda m, x: m.base_layer(x) * (2 if m.base_layer(x).max() > 1e9 else 3),
    "beside its own": lambda m, x: m.base_layer(x) * (2 if (m.up[0, 0] + x[0, 0, 0]) > 9 else 3),
    "in a pair": lambda m, x: m.base_layer(x) * (2 if x.max(-1).values.sum() > 1e9 else 3),
    "as a number": lambda m, x: m.base_layer(x) * x.sum().item(),
}


@pytest.mark.parametrize("function", BY_INPUT.values(), ids=BY_INPUT)
def test_a_branch_on_its_input_is_refused(function: Any) -> None:
    with pytest.raises(AdapterError, match="its Python code branches on what its input is"):
        read(Wraps(function))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: m.base_layer(x).tanh(), "no affine function of its input: tanh"),
        (lambda m, x: m.base_layer(x * x.mean()), "no affine function of its input"),
        (lambda m, x: m.base_layer(x).flip(1), "no affine function of its input"),
        (lambda m, x: m.base_layer(x)[..., :3], r"it gives \(3, 3\), the base's layer \(5, 3\)"),
    ],
)
def test_what_is_no_layer_says_why(function: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        read(Wraps(function))


def test_what_fails_on_any_input_is_said_by_name() -> None:
    with pytest.raises(TraceError, match=r"Wraps cannot be traced \(export\)"):
        read(Wraps(lambda m, x: x @ m.up))


def test_a_layer_that_is_not_wrapped_is_refused() -> None:
    layer = nn.Linear(3, 5)
    base = layer_of(layer)
    assert base is not None
    with pytest.raises(AdapterError, match="PEFT wraps no Linear for mine, so this"):
        update_of(layer, base, dict(layer.named_parameters()), "mine", Traces())
