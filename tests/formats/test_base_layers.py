"""The layers of a base."""

from __future__ import annotations

from typing import Any

import loralib
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx.errors import AdapterError
from lora_fx.formats.base_layers import BaseLayer, layers_of


class Kinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)
        self.again = self.fc
        make: Any = Conv1D
        self.turned = make(7, 5)
        self.fused = loralib.MergedLinear(7, 6, r=2, enable_lora=[True, False], fan_in_fan_out=True)
        self.conv = nn.Conv2d(2, 3, 1)
        self.norm = nn.LayerNorm(6)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.turned(self.act(self.fc(x)))
        return result


def test_every_layer_with_a_weight_is_listed_with_its_kind() -> None:
    assert layers_of(Kinds()) == {
        "fc": BaseLayer("Linear", (5, 3)),
        "again": BaseLayer("Linear", (5, 3)),
        "turned": BaseLayer("Conv1D", (7, 5)),
        "fused": BaseLayer("MergedLinear", (6, 7)),
        "conv": BaseLayer("Conv2d", None),
        "norm": BaseLayer("LayerNorm", None),
    }


def test_a_traced_graph_has_its_linear_layers() -> None:
    gm = lora_fx.trace(Kinds(), (torch.randn(4, 7, 3),))
    shapes = {path: layer.shape for path, layer in layers_of(gm).items()}
    assert shapes == {"fc": (5, 3), "turned": (7, 5)}


@pytest.mark.parametrize("base", [{"fc": 1}, "model", nn.Linear])
def test_what_is_no_module_is_refused(base: Any) -> None:
    with pytest.raises(AdapterError, match=r"base is a .*, expected the model or the traced graph"):
        layers_of(base)
