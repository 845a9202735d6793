"""What a base tells of the layers of a PEFT file."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx import AdapterError
from lora_fx.formats.peft_base import base_of
from lora_fx.testing import tiny


def test_without_a_base_nothing_is_known() -> None:
    base = base_of(None)
    assert (base.model, base.layers, base.tied_to("x"), base.is_graph) == (None, {}, [], False)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(AdapterError, match="base is a str, expected the model"):
        base_of("model")


def test_shapes_are_those_of_the_weights_whatever_way_they_are_stored() -> None:
    layers = [nn.Linear(3, 5), Conv1D(7, 5), nn.Embedding(11, 6), nn.Conv2d(4, 6, 3, groups=2)]
    base = base_of(nn.Sequential(*layers))
    assert base.layers == {"0": (5, 3), "1": (7, 5), "2": (6, 11), "3": (6, 2, 3, 3)}
    assert base.linear == {"0", "1"}


def test_parameters_are_in_the_order_of_registration() -> None:
    module = nn.Module()
    for name, size in (("z", 3), ("a", 5)):
        module.register_parameter(name, nn.Parameter(torch.ones(size, 2)))
    module.fc = nn.Linear(3, 5)
    assert list(base_of(nn.ModuleDict({"m": module})).parameters("m")) == ["z", "a"]


def test_the_head_that_transformers_ties_is_found() -> None:
    ids = {"input_ids": torch.tensor([[1, 2, 3]])}
    for is_tied in (True, False):
        model = tiny("Qwen2ForCausalLM", tie_word_embeddings=is_tied, num_hidden_layers=1).eval()
        for given in (model, lora_fx.trace(model, (), ids)):
            assert base_of(given).tied_to("model.embed_tokens") == ["lm_head"] * is_tied


def test_a_weight_that_nobody_says_is_tied_is_none() -> None:
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11, bias=False))
    model[1].weight = model[0].weight
    assert base_of(model).tied_to("0") == []
