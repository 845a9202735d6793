"""What no adapter is, and what an adapter leaves open."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lora_fx.export import to_onnx
from lora_fx.export.onnx_model.model_file import load_proto, manifest_in
from lora_fx.export.slots.every_value import every_value
from lora_fx.testing import traced


def test_every_input_has_a_value_and_the_adapter_s_come_first(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4, bias=False))
    path, gm = tmp_path / "m.onnx", traced(model, torch.randn(2, 3))
    slots = {"0": "factors", "1": "weight"}
    to_onnx(gm, path, adapters="required", slots=slots, vectors=True, verify=False)
    manifest = manifest_in(load_proto(path), path)
    assert manifest is not None
    none = every_value(manifest, path)
    assert {name: tuple(value.shape) for name, value in none.items()} == {
        "0.lora_A": (3, 1), "0.lora_B": (1, 5), "0.lora_gain": (5,), "0.lora_bias": (5,),
        "0.lora_col": (3,), "1.weight": (4, 5),
    }  # fmt: skip
    assert torch.equal(none["1.weight"], model[1].weight.detach())
    assert torch.equal(none["0.lora_col"], torch.ones(3))
    given = {
        "0.lora_A": torch.zeros(3, 0),
        "0.lora_B": torch.zeros(0, 5),
        "1.weight": none["1.weight"] + 1,
    }
    found = every_value(manifest, path, given)
    assert found["0.lora_A"].shape == (3, 1)
    assert torch.equal(found["1.weight"], given["1.weight"])
    assert not torch.equal(found["1.weight"], none["1.weight"])
