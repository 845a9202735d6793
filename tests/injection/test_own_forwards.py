"""Layers whose forward is more than a product: PEFT's forward is not the layer with W' there."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx import Adapter, AdapterWarning, fold, inject, load_adapter, trace
from lora_fx.injection import own_forwards
from lora_fx.layers.sites import by_path
from lora_fx.testing import make_adapter, relative


class Halved(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * F.linear(x, self.weight, self.bias)


class Normed(nn.Linear):
    def __init__(self, wide: int, high: int) -> None:
        super().__init__(wide, high)
        self.norm = nn.LayerNorm(wide)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.norm(x))


class Rectified(nn.Conv1d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


class Cast(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.weight.dtype)).float()


class Flat(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(0, 1)).reshape(*x.shape[:2], 5)


class Added(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x.sin().sum(-1, keepdim=True)


class Causal(nn.Conv1d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.pad(x, (2, 0)))


class Scaled(nn.Embedding):
    def __init__(self, name: str) -> None:
        super().__init__(7, 5)
        setattr(self, name, 3.0)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        factor: float = self.__dict__.get("embed_scale", 3.0)
        return super().forward(ids) * factor


class Shifted(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids + 1)


def hooked(before: bool) -> nn.Module:
    layer = nn.Linear(3, 5)
    if before:
        layer.register_forward_pre_hook(lambda _, given: (given[0].sin(),))
    else:
        layer.register_forward_hook(lambda _, given, made: made * 2)
    return layer


def rows() -> torch.Tensor:
    return torch.randn(2, 4, 3)


def signal() -> torch.Tensor:
    return torch.randn(2, 3, 9)


def ids() -> torch.Tensor:
    return torch.arange(6).reshape(2, 3)


# A layer, what it reads, options of PEFT's, and what it does more, if PEFT's sum is another.
CASES: dict[str, tuple[Callable[[], Any], Callable[[], torch.Tensor], dict[str, Any], str]] = {
    "its product halved": (lambda: Halved(3, 5), rows, {}, "Halved .* (mul)"),
    "a norm before it": (lambda: Normed(3, 5), rows, {}, "Normed .* (layer_norm)"),
    "a relu behind it": (lambda: Rectified(3, 5, 3), signal, {}, "Rectified .* (relu)"),
    "a hook before it": (lambda: hooked(True), rows, {}, "Linear .* (sin)"),
    "a hook behind it": (lambda: hooked(False), rows, {}, "Linear .* (mul)"),
    "its rows scaled": (lambda: Scaled("scale"), ids, {}, "Scaled .* (mul)"),
    "its ids shifted": (lambda: Shifted(7, 5), ids, {}, "Shifted .* (add)"),
    "added to, under DoRA": (lambda: Added(3, 5), rows, {"use_dora": True}, "Added .* (sin)"),
    "halved, under DoRA": (lambda: Halved(3, 5), rows, {"use_dora": True}, "Halved .* (mul)"),
    "a cast": (lambda: Cast(3, 5), rows, {}, ""),
    "other axes": (lambda: Flat(3, 5), rows, {}, ""),
    "added to": (lambda: Added(3, 5), rows, {}, ""),
    "its rows scaled as PEFT knows it": (lambda: Scaled("embed_scale"), ids, {}, ""),
    "a layer of torch's": (lambda: nn.Linear(3, 5), rows, {"use_dora": True}, ""),
}


def model_of(layer: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), layer, nn.Tanh())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


def told(gm: Any, adapter: Adapter) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tuned = inject(gm, adapter)
    return tuned, [str(w.message) for w in caught if w.category is AdapterWarning]


@pytest.mark.parametrize("name", CASES)
def test_peft_gives_other_numbers_where_it_is_told(name: str, tmp_path: Path) -> None:
    make, given, options, more = CASES[name]
    torch.manual_seed(1)
    model, x = model_of(make()), given()
    config = peft.LoraConfig(r=2, target_modules=["1"], init_lora_weights=False, **options)
    trained: Any = peft.get_peft_model(copy.deepcopy(model), config).eval()
    for key, parameter in trained.named_parameters():
        parameter.data += 0.3 * ("magnitude" in key)
    trained.save_pretrained(str(tmp_path / "french"))
    tuned, messages = told(trace(model, (x,)), load_adapter(tmp_path / "french"))

    expected, found = trained(x).detach(), tuned(x).detach()
    assert (relative(found, expected) > 1e-2) == bool(more) == bool(messages)
    assert relative(expected, model(x)) > 1e-2, "the control: the adapter is seen"
    if more:
        words, _, operator = more.partition(" .* ")
        (message,) = messages
        assert f", 1: {words} does more" in message
        assert operator in message
        assert relative(fold(trace(trained, (x,)))(x), expected) < 1e-5, "as the message says"
    merged = trained.merge_and_unload()
    assert relative(found, merged(x)) < 1e-5


def test_what_peft_cannot_run_is_not_told() -> None:
    model, x = model_of(Causal(3, 5, 3)), signal()
    config = peft.LoraConfig(r=2, target_modules=["1"])
    with pytest.raises(RuntimeError, match="must match"):
        peft.get_peft_model(copy.deepcopy(model), config)(x)
    adapter = make_adapter({"1": (5, 3, 3)})
    assert told(trace(model, (x,)), adapter)[1] == []


def test_of_a_graph_without_example_inputs_all_of_them_are_told() -> None:
    gm = trace(model_of(Halved(3, 5)))
    assert list(by_path(gm)) == ["1"]
    assert len(told(gm, make_adapter({"1": (5, 3)}))[1]) == 1


def test_a_layer_of_gpt2_is_plain_whoever_traces_it() -> None:
    model = model_of(Conv1D(5, 3))
    for args in ((rows(),), None):
        assert told(trace(model, args), make_adapter({"1": (5, 3)}))[1] == []


def test_no_model_is_run_for_layers_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_forwards, "_apart", None)
    first = make_adapter({"1": (5, 3)})
    again = Adapter("german", first.updates)
    gm = trace(model_of(nn.Linear(3, 5)), (rows(),))
    assert told(inject(gm, first), again)[1] == []
    with pytest.raises(TypeError, match="not callable"):
        inject(trace(model_of(Added(3, 5)), (rows(),)), first)


def test_the_numbers_that_a_model_draws_are_not_moved() -> None:
    model = nn.Sequential(nn.Identity(), Added(3, 5)).eval()
    gm = trace(model, (rows(),))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lora_fx.inject(gm, make_adapter({"1": (5, 3)}))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert not model[1]._forward_pre_hooks
