"""The keys of a loralib file, each with one use."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_fx.errors import AdapterError
from lora_fx.formats.loralib import sort_loralib
from lora_fx.layers.base_layers import layers_of

PAIR = {"fc.lora_A": torch.ones(2, 3), "fc.lora_B": torch.ones(5, 2)}
WEIGHT = {"fc.weight": torch.ones(5, 3)}
NORM = {"norm.weight": torch.ones(5), "norm.bias": torch.zeros(5)}


def test_an_adapter_has_pairs_and_biases() -> None:
    found = sort_loralib(PAIR | {"fc.bias": torch.ones(5)}, layers_of(None))
    assert list(found.layers) == ["fc"]
    assert found.weights == {}
    assert list(found.replacements) == ["fc.bias"]


def test_a_whole_model_has_weights_and_everything_else() -> None:
    found = sort_loralib(PAIR | WEIGHT | NORM, layers_of(None))
    assert list(found.weights) == ["fc"]
    assert set(found.replacements) == set(NORM)


def test_what_the_base_has_is_left_out() -> None:
    base = nn.ModuleDict({"fc": nn.Linear(3, 5), "norm": nn.LayerNorm(5)})
    assert sort_loralib(PAIR | WEIGHT | NORM, layers_of(base)).replacements == {}
    trained = NORM | {"norm.bias": torch.full((5,), 0.5)}
    for dtype in (torch.float32, torch.float16):
        state = {key: value.to(dtype) for key, value in (PAIR | WEIGHT | trained).items()}
        assert list(sort_loralib(state, layers_of(base)).replacements) == ["norm.bias"]
    alone = sort_loralib(PAIR | {"norm.bias": NORM["norm.bias"]}, layers_of(base))
    assert list(alone.replacements) == ["norm.bias"]


def test_a_convolution_s_own_parameters_are_those_of_its_child() -> None:
    state = {"fc.conv.weight": torch.ones(5, 3, 1), "fc.conv.bias": torch.ones(5)}
    found = sort_loralib(PAIR | state | {"other.conv.bias": torch.ones(5)}, layers_of(None))
    assert list(found.weights) == ["fc"]
    assert list(found.replacements) == ["fc.bias", "other.conv.bias"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"head.weight": torch.ones(5)}, r"no known use: head\.weight; .*the whole model"),
        ({"fc.lora_alpha": torch.ones(1)}, r"no known use: fc\.lora_alpha"),
        ({**WEIGHT, "fc.lora_alpha": torch.ones(1)}, r"no known use: fc\.lora_alpha"),
        ({"up.lora_A": torch.ones(2, 3)}, r"half of a pair.*: up\.lora_A"),
        (
            {**WEIGHT, "up.lora_A": torch.ones(2, 3), "up.lora_B": torch.ones(5, 2)},
            r"1 tensors have names of no known use: fc\.weight",
        ),
    ],
)
def test_a_key_without_a_use_is_named(more: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        sort_loralib(PAIR | more, layers_of(None))
