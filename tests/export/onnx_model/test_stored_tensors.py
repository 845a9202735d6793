"""What a model file holds: each tensor by name, read when asked for, of a file as exported."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import ExportError
from lora_fx.export import to_onnx
from lora_fx.export.onnx_model.stored_tensors import tensors_in


@pytest.mark.parametrize("beside", [0, 128_000_000])
def test_tensors_and_calls_of_a_file(beside: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 128), nn.Tanh(), nn.Linear(128, 4)).eval()
    gm = lora_fx.trace(model, (torch.randn(2, 3),))
    to_onnx(gm, tmp_path / "model.onnx", external_data_above=beside, verify=False)
    held = tensors_in(tmp_path / "model.onnx")
    weight = held.tensors["0.weight"]()
    assert torch.equal(weight, model[0].weight.detach().t()) or torch.equal(
        weight, model[0].weight.detach()
    )
    assert held.calls["Tanh"] == 1


def test_a_file_that_was_changed_since_is_refused(tmp_path: Path) -> None:
    gm = lora_fx.trace(nn.Linear(3, 5).eval(), (torch.randn(2, 3),))
    to_onnx(gm, tmp_path / "model.onnx", verify=False)
    proto = onnx.load(tmp_path / "model.onnx")
    data = bytearray(proto.graph.initializer[0].raw_data)
    data[0] ^= 1
    proto.graph.initializer[0].raw_data = bytes(data)
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=r"model\.onnx"):
        tensors_in(tmp_path / "model.onnx")
