"""The layers of a base."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import loralib
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx.errors import AdapterError
from lora_fx.layers.base_layers import BaseLayers, layers_of
from lora_fx.layers.layer import Layer
from lora_fx.testing import tiny


class Kinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 3)
        self.fc = nn.Linear(3, 5)
        self.again = self.fc
        make: Any = Conv1D
        self.turned = make(7, 5)
        self.fused = loralib.MergedLinear(7, 6, r=2, enable_lora=[True, False], fan_in_fan_out=True)
        self.conv = nn.Conv1d(4, 6, 3, groups=2, padding=1)
        self.norm = nn.LayerNorm(7)
        self.back = nn.ConvTranspose1d(2, 3, 1)
        self.act = nn.ReLU()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.turned(self.act(self.fc(self.table(ids)))))
        result: torch.Tensor = self.conv(x)
        return result


def layers(**given: tuple[Any, ...]) -> dict[str, Layer]:
    found = {}
    for path, (kind, shape, *groups) in given.items():
        found[path] = Layer(path=path, kind=kind, shape=shape, dtype=torch.float32)
        found[path] = replace(found[path], groups=groups[0] if groups else 1)
    return found


FOUND = layers(
    table=("embedding", (3, 11)),
    fc=("linear", (5, 3)),
    turned=("linear_transposed", (7, 5)),
    norm=("norm", (7,)),
    conv=("conv1d", (6, 4, 3), 2),
)


IDS = torch.tensor([[1, 5, 3, 9], [2, 2, 0, 10]])


def test_every_layer_with_a_weight_is_listed_with_its_kind() -> None:
    found = layers_of(Kinds())
    assert dict(found) == FOUND | layers(
        again=("linear", (5, 3)),
        fused=("linear_transposed", (6, 7)),
        back=("conv_transpose1d", (3, 2, 1)),
    )
    names = {path: layer.name for path, layer in found.items()}
    assert names["turned"] == "Conv1D"
    assert names["fused"] == "MergedLinear"


def test_a_traced_graph_has_the_same_layers_as_far_as_it_calls_them() -> None:
    gm = lora_fx.trace(Kinds().eval(), (IDS,))
    found = layers_of(gm)
    assert dict(found) == FOUND
    assert (found.is_graph, found.aliases) == (True, {"fc": ("again",), "again": ("fc",)})


def test_of_what_is_no_matrix_and_of_what_files_do_not_hold_there_is_no_shape() -> None:
    found = layers_of(Kinds())
    assert {path for path in found if found.shape_of(path) is None} == {"norm", "back"}
    assert [found.shape_of("conv"), found.shape_of("table")] == [(6, 2, 3), (3, 11)]
    assert found.shape_of("gone") is None


def test_a_parameter_is_found_by_the_path_of_its_module() -> None:
    model = Kinds().eval()
    for found in map(layers_of, (model, lora_fx.trace(model, (IDS,)))):
        for name in ("fc.weight", "norm.bias", "conv.weight"):
            value = found.parameter(name)
            assert value is not None
            assert torch.equal(value, model.get_parameter(name))
        assert found.parameter("fc.scale") is None
        assert found.parameter("head.weight") is None


def test_without_a_base_nothing_is_known() -> None:
    nothing = layers_of(None)
    assert isinstance(nothing, BaseLayers)
    assert (dict(nothing), nothing.base, nothing.tied_to("x")) == ({}, None, [])
    assert (nothing.parameter("x.weight"), nothing.parameters("x")) == (None, {})


@pytest.mark.parametrize("base", [{"fc": 1}, "model", nn.Linear])
def test_what_is_no_module_is_refused(base: Any) -> None:
    with pytest.raises(AdapterError, match=r"base is a .*, expected the model or the traced graph"):
        layers_of(base)


def test_parameters_are_in_the_order_of_registration() -> None:
    module = nn.Module()
    for name, size in (("z", 3), ("a", 5)):
        module.register_parameter(name, nn.Parameter(torch.ones(size, 2)))
    module.fc = nn.Linear(3, 5)
    assert list(layers_of(nn.ModuleDict({"m": module})).parameters("m")) == ["z", "a"]


def test_the_head_that_transformers_ties_is_found() -> None:
    ids = {"input_ids": torch.tensor([[1, 2, 3]])}
    for is_tied in (True, False):
        model = tiny("Qwen2ForCausalLM", tie_word_embeddings=is_tied, num_hidden_layers=1).eval()
        for given in (model, lora_fx.trace(model, (), ids)):
            assert layers_of(given).tied_to("model.embed_tokens") == ["lm_head"] * is_tied


def test_a_weight_that_nobody_says_is_tied_is_none() -> None:
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11, bias=False))
    model[1].weight = model[0].weight
    assert layers_of(model).tied_to("0") == []
