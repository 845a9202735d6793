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
from lora_fx.formats.base_layers import BaseLayer, layers_of, parameter_of


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


FOUND = {
    "table": BaseLayer("Embedding", "embedding", (3, 11)),
    "fc": BaseLayer("Linear", "linear", (5, 3)),
    "turned": BaseLayer("Conv1D", "linear_transposed", (7, 5)),
    "norm": BaseLayer("LayerNorm", "norm", (7,)),
    "conv": BaseLayer("Conv1d", "conv1d", (6, 2, 3), 2),
}


def _told(layers: dict[str, BaseLayer]) -> dict[str, Any]:
    return {path: (layer.kind, layer.shape, layer.groups) for path, layer in layers.items()}


IDS = torch.tensor([[1, 5, 3, 9], [2, 2, 0, 10]])


def test_every_layer_with_a_weight_is_listed_with_its_kind() -> None:
    assert layers_of(Kinds()) == FOUND | {
        "again": BaseLayer("Linear", "linear", (5, 3)),
        "fused": BaseLayer("MergedLinear", "linear_transposed", (6, 7)),
        "back": BaseLayer("ConvTranspose1d"),
    }


def test_a_traced_graph_has_the_same_layers_as_far_as_it_calls_them() -> None:
    gm = lora_fx.trace(Kinds().eval(), (IDS,))
    assert _told(layers_of(gm)) == _told(FOUND)


def test_what_is_no_matrix_is_told() -> None:
    assert {path for path, layer in layers_of(Kinds()).items() if not layer.is_matrix} == {
        "norm",
        "back",
    }


def test_a_parameter_is_found_by_the_path_of_its_module() -> None:
    model = Kinds().eval()
    gm = lora_fx.trace(model, (IDS,))
    for base in (model, gm):
        for name in ("fc.weight", "norm.bias", "conv.weight"):
            found = parameter_of(base, name)
            assert found is not None
            assert torch.equal(found, model.get_parameter(name))
        assert parameter_of(base, "fc.scale") is None
        assert parameter_of(base, "head.weight") is None
    assert parameter_of({"fc.weight": 1}, "fc.weight") is None


@pytest.mark.parametrize("base", [{"fc": 1}, "model", nn.Linear])
def test_what_is_no_module_is_refused(base: Any) -> None:
    with pytest.raises(AdapterError, match=r"base is a .*, expected the model or the traced graph"):
        layers_of(base)
