from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora_fx.export.verification.negative_controls import controls, without_adapters
from lora_fx.passes import FoldLora, InjectLora
from lora_fx.testing import traced


def test_controls_of_a_folded_graph_are_its_base(mlp: Any) -> None:
    gm = InjectLora(mlp.adapter(2))(mlp.gm).graph_module
    for form in (gm, FoldLora()(gm).graph_module):
        first = next(iter(controls(form)))
        found = list(first.eager(**mlp.other).values())
        assert first.what == "control: no adapters"
        assert all(torch.equal(a, b) for a, b in zip(found, mlp.eager(), strict=True))
    names = [control.what for control in controls(mlp.gm)]
    assert names[:2] == ["control: up.weight x 1.1", "control: tail.1.weight x 1.1"]


def test_scaling_a_weight_leaves_the_graph_alone(mlp: Any) -> None:
    before = {name: value.clone() for name, value in mlp.gm.state_dict().items()}
    scaled = [control.eager for control in controls(mlp.gm)]
    assert torch.allclose(scaled[0].get_parameter("up.weight"), before["up.weight"] * 1.1)
    assert torch.equal(scaled[1].get_parameter("up.weight"), before["up.weight"])
    for name, value in mlp.gm.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_graph_without_weights_has_no_control() -> None:
    gm = traced(nn.ReLU(), torch.randn(4, 7))
    assert without_adapters(gm) is None
    assert list(controls(gm)) == []
