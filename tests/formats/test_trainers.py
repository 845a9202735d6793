"""Files of kohya's kind that other trainers write: called or spelled otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import lora_fx
from lora_fx.adapters.adapter import Update
from lora_fx.testing import relative, same_adapter

Tensors = dict[str, torch.Tensor]


def test_a_file_is_told_by_its_tensors_whatever_it_is_called(tmp_path: Path) -> None:
    """LCM's LoRA, and LyCORIS of trainers, are called as diffusers' files and are none."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"mid": nn.Sequential(nn.Linear(3, 5))})
    state = {"lora_unet_mid_0.lora_down.weight": torch.randn(2, 3)}
    state["lora_unet_mid_0.lora_up.weight"] = torch.randn(5, 2)
    state["lora_unet_mid_0.alpha"] = torch.tensor(1.0)
    file = tmp_path / "lcm" / "pytorch_lora_weights.safetensors"
    file.parent.mkdir()
    save_file(state, file)
    renamed = tmp_path / "a.safetensors"
    save_file(state, renamed)
    wanted = lora_fx.load_adapter(renamed, base=model, name="a")
    [update] = wanted.updates.values()
    assert isinstance(update, Update)
    assert update.scale == 0.5
    for place in (file, file.parent):
        found = lora_fx.load_adapter(place, base=model, name="a")
        same_adapter(found, wanted)
    assert lora_fx.load_adapter(file.parent, base=model).name == "lcm"


def test_lycoris_beside_names_of_diffusers_is_read(reads: Any) -> None:
    """As OneTrainer and ai-toolkit write them: a scale of inputs, LoKr with alpha, a difference."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"transformer_blocks": nn.Sequential(nn.Linear(6, 4))})
    path, weight = "transformer.transformer_blocks.0", next(net.parameters()).detach()
    pair = {f"{path}.lora_A.weight": torch.randn(2, 6), f"{path}.lora_B.weight": torch.randn(4, 2)}
    down, up = pair.values()
    scale = torch.rand(1, 6) + 0.5
    one, low, high = torch.randn(2, 3), torch.randn(2, 1), torch.randn(1, 2)
    lokr = {"lokr_w1": one, "lokr_w2_a": low, "lokr_w2_b": high, "alpha": torch.tensor(0.5)}
    both = weight + up @ down
    cases: list[tuple[Tensors, torch.Tensor]] = [
        ({**pair, f"{path}.dora_scale": scale}, both * scale / both.norm(dim=0)),
        ({f"{path}.{k}": v for k, v in lokr.items()}, weight + 0.5 * torch.kron(one, low @ high)),
        ({f"{path}.diff": up @ down}, both),
    ]
    for tensors, want in cases:
        [update] = reads(tensors, base=net).updates.values()
        assert relative(update.weight(weight), want) < 1e-6
        assert relative(update.weight(weight), weight + 0.9 * (want - weight)) > 1e-2


@pytest.mark.parametrize("count", [7, 5])  # as many entries as features, too
def test_a_difference_of_a_table_is_as_the_table_is_stored(
    reads: Any, rewritten: Any, count: int
) -> None:
    """As ai-toolkit writes it, and ComfyUI adds it."""
    torch.manual_seed(0)
    net, ids = nn.Sequential(nn.Embedding(count, 5), nn.Linear(5, 4)), torch.tensor([[1, 4, 3]])
    diff = torch.randn(count, 5)
    adapter = reads({"diffusion_model.0.diff": diff}, base=net)
    got = lora_fx.inject(lora_fx.trace(net.eval(), (ids,)), adapter)(ids)
    assert relative(got, net[1](net[0](ids) + F.embedding(ids, diff))) < 1e-6
    assert relative(got, net(ids)) > 1e-2
    tensors, again = rewritten(adapter, "kohya", net, component="unet")
    assert torch.equal(tensors["lora_unet_0.diff"], diff)
    weight = torch.randn(5, count)
    assert torch.equal(again.updates["0"].weight(weight), weight + diff.T)
