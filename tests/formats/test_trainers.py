"""Files of kohya's kind that other trainers write: called or spelled otherwise."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import lora_fx
from lora_fx.adapters.adapter import Update
from lora_fx.errors import AdapterError
from lora_fx.testing import relative, same_adapter, same_tensors

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
        # ai-toolkit's DoRA, whose alpha is the rank
        ({**pair, f"{path}.magnitude": scale[0, :4]},
         both * scale[:, :4].T / both.norm(dim=1, keepdim=True)),
    ]  # fmt: skip
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


def test_magnitudes_without_the_scale_beside_them_are_refused(reads: Any) -> None:
    """Under kohya's names ai-toolkit's alpha is not the rank, and no file of DoRA has it."""
    net = nn.ModuleDict({"fc": nn.Linear(6, 4)})
    pair = {"lora_unet_fc.lora_down.weight": torch.ones(2, 6)}
    pair |= {"lora_unet_fc.lora_up.weight": torch.ones(4, 2)}
    with pytest.raises(AdapterError, match=r"no known use: lora_unet_fc\.magnitude"):
        reads({**pair, "lora_unet_fc.magnitude": torch.ones(4)}, base=net)


class Turned(nn.Module):
    """Convolutions of nine points and of one, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.point = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.fc = nn.Linear(8, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.point(torch.tanh(self.conv(x)))).mean((2, 3))
        result: torch.Tensor = self.fc(x)
        return result


def rotated(values: torch.Tensor, size: int, times: int) -> torch.Tensor:
    """(columns, columns), of blocks around the diagonal: the series of OneTrainer's OFT."""
    skew = torch.zeros(len(values), size, size)
    skew[:, *torch.triu_indices(size, size, 1)] = values
    skew = skew - skew.mT
    second = skew @ skew
    blocks = torch.eye(size) + 2 * (skew + second + skew @ second) + second @ second
    whole: torch.Tensor = torch.block_diag(*blocks.repeat(times, 1, 1))  # type: ignore[no-untyped-call]
    return whole


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("flag", [None, torch.tensor(True), torch.tensor(1.0).half()])
def test_rotations_of_onetrainer_are_of_inputs(
    reads: Any, rewritten: Any, tmp_path: Path, is_shared: bool, flag: torch.Tensor | None
) -> None:
    """A linear layer reads what is turned; of a convolution each row is, of all points."""
    torch.manual_seed(0)
    net, x, tensors = Turned().eval(), torch.randn(2, 4, 5, 6), {}
    wanted = copy.deepcopy(net)
    for (name, layer), size in zip(net.named_children(), (4, 3, 2), strict=True):
        weight: Any = layer.weight
        columns = weight[0].numel()
        values = 0.3 * torch.randn(1 if is_shared else columns // size, size * (size - 1) // 2)
        tensors[f"lora_unet_{name}.oft_R.weight"] = values
        tensors |= {} if flag is None else {f"lora_unet_{name}.oft_R.scaled_oft": flag.clone()}
        own = values if flag is None else values / (2 * (size - 1) ** 0.5)
        turn = rotated(own, size, columns // size // len(values))
        turn = turn if weight.ndim > 2 else turn.T
        target: Any = wanted.get_submodule(name).weight
        target.data = (weight.detach().flatten(1) @ turn).reshape(weight.shape)
    adapter = reads(tensors, base=net)
    got = lora_fx.inject(lora_fx.trace(net, (x,)), adapter)
    assert relative(got(x), wanted(x)) < 1e-6
    assert relative(lora_fx.fold(got)(x), wanted(x)) < 1e-6
    assert relative(net(x), wanted(x)) > 1e-2
    again, _ = rewritten(adapter, "kohya", net, component="unet")
    same_tensors(again, tensors)
    with pytest.raises(AdapterError, match="no one type of PEFT holds oft"):
        lora_fx.save_adapter(adapter, tmp_path / "peft")


def test_rotations_of_onetrainer_s_linear_layers_are_peft_s(reads: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 5)).eval(), torch.randn(3, 8)
    tensors = {
        f"transformer.{n}.oft_R.weight": 0.3 * torch.randn(c, 6) for n, c in ((0, 2), (2, 3))
    }
    lora_fx.save_adapter(reads(tensors, base=net), tmp_path / "peft")
    by_peft = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path / "peft")).eval()
    wanted = net
    for layer, values in zip((net[0], net[2]), tensors.values(), strict=True):
        layer.weight.data = layer.weight.data @ rotated(values, 4, 1).T
    assert relative(by_peft(x), wanted(x)) < 1e-6
    own = lora_fx.load_adapter(tmp_path / "peft")
    with pytest.raises(AdapterError, match="kohya's format cannot hold updates of kind 'oft'"):
        lora_fx.save_adapter(own, tmp_path / "a.safetensors", format="kohya", component="unet")
