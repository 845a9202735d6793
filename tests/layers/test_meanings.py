"""Names that follow from those of a base."""

from __future__ import annotations

import torch
from torch import nn

from lora_fx.layers.base_layers import layers_of
from lora_fx.layers.meanings import Meaning, conventional


class Experts(nn.Module):
    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.is_transposed = turned
        self.gate_up_proj = nn.Parameter(torch.randn(2, 10, 3))
        self.down_proj = nn.Parameter(torch.randn(2, 3, 5))


def test_parts_of_a_packed_layer() -> None:
    base = layers_of(nn.ModuleDict({"to_qkv": nn.Linear(3, 14)}))
    found = conventional(base)
    assert found.keys() == {"to_q", "to_k", "to_v"}
    rows = {name: found[name].rows(base, size) for name, size in zip(found, (6, 4, 4), strict=True)}
    assert rows == {"to_q": range(6), "to_k": range(6, 10), "to_v": range(10, 14)}
    assert found["to_q"].shape(base) == (None, 3)


def test_a_pack_of_layers_that_read_as_much() -> None:
    layers = {name: nn.Linear(3, out) for name, out in (("gate_proj", 5), ("up_proj", 7))}
    base = layers_of(nn.ModuleDict(layers))
    assert conventional(base) == {"gate_up_proj": Meaning(("gate_proj", "up_proj"))}
    assert conventional(base)["gate_up_proj"].shape(base) == (12, 3)
    other = nn.ModuleDict({"gate_proj": nn.Linear(3, 5), "up_proj": nn.Linear(4, 5)})
    assert conventional(layers_of(other)) == {}


def test_experts_of_a_parameter_by_both_families_names() -> None:
    base = layers_of(nn.ModuleDict({"experts": Experts()}))
    found = conventional(base)
    names = {f"experts.{e}.{n}" for e in (0, 1) for n in ("w1", "w2", "w3")}
    names |= {f"experts.{e}.{n}_proj" for e in (0, 1) for n in ("gate", "up", "down")}
    assert found.keys() == names
    assert found["experts.1.w3"] == Meaning(("experts.gate_up_proj",), 1, 1)
    assert found["experts.1.w3"].rows(base, 5) == range(5, 10)
    assert found["experts.0.down_proj"].shape(base) == (3, 5)
    assert conventional(layers_of(nn.ModuleDict({"experts": Experts(turned=True)}))) == {}
