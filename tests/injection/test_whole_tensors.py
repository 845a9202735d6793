"""Modules that an adapter brings whole: statistics, counts, what symbolic traces keep closed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_fx
from lora_fx.errors import ExportError
from lora_fx.numerics import compare
from lora_fx.passes import StripLora

INNER = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(5),
    "without momentum": lambda: nn.BatchNorm1d(5, momentum=None),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(5, affine=True, track_running_stats=True),
    "PReLU": lambda: nn.PReLU(5),
    "a nest": lambda: nn.Sequential(nn.BatchNorm1d(5), nn.PReLU(5)),
}


class Net(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.fc, self.inner, self.out = nn.Linear(3, 5), inner, nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.inner(self.fc(x).transpose(1, 2)).transpose(1, 2))


def saved(net: Net, path: Path) -> nn.Module:
    """PEFT's model, trained a little, whose adapter holds the inner module whole."""
    config = LoraConfig(
        r=2, target_modules=["fc"], modules_to_save=["inner"], init_lora_weights=False
    )
    tuned = get_peft_model(copy.deepcopy(net), config).train()
    gen = torch.Generator().manual_seed(1)
    for _ in range(3):
        tuned(2 * torch.randn(9, 2, 3, generator=gen) + 1)
    with torch.no_grad():
        for name, value in tuned.named_parameters():
            value += 0.3 if "modules_to_save" in name else 0
    tuned.eval().save_pretrained(str(path))
    return tuned


@pytest.mark.parametrize("frontend", ["export", "symbolic"])
@pytest.mark.parametrize("name", INNER)
def test_a_module_is_replaced_whole_and_given_back(
    name: str, frontend: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net, x = Net(INNER[name]()).eval(), torch.randn(7, 2, 3)
    want = saved(net, tmp_path / "a")(x).detach()
    gm = lora_fx.trace(net, (x,), frontend=frontend)
    before = gm(x)

    adapter = lora_fx.load_adapter(tmp_path / "a", base=gm)
    tuned = lora_fx.inject(gm, adapter)

    assert compare(tuned(x), want).ok
    without = lora_fx.Adapter("b", adapter.updates)
    assert not compare(lora_fx.inject(gm, without)(x), want).ok  # the control
    assert torch.equal(gm(x), before)
    assert torch.equal(StripLora()(tuned).graph_module(x), before)


def test_what_is_held_in_a_closed_module_is_exported(tmp_path: Path) -> None:
    net, x = Net(nn.BatchNorm1d(5)).eval(), torch.randn(7, 2, 3)
    want = saved(net, tmp_path / "a")(x).detach()
    adapter = lora_fx.load_adapter(tmp_path / "a", base=net)
    gm = lora_fx.trace(net, (x,), frontend="symbolic")
    report = lora_fx.to_onnx(lora_fx.fold(lora_fx.inject(gm, adapter)), tmp_path / "m.onnx")
    assert "coverage 7 of 7 adapter tensors" in str(report)
    [got] = lora_fx.Session(tmp_path / "m.onnx").run({"x": x}).values()
    assert compare(torch.tensor(got), want).ok


def test_a_closed_module_still_follows_the_mode(tmp_path: Path) -> None:
    net, x = Net(nn.BatchNorm1d(5)).eval(), torch.randn(7, 2, 3)
    tuned = saved(net, tmp_path / "a")
    gm = lora_fx.trace(net, (x,), frontend="symbolic")
    held = lora_fx.inject(gm, lora_fx.load_adapter(tmp_path / "a", base=net)).train()
    held(x)
    assert compare(held.inner.running_mean, _after(tuned, x)).ok
    assert torch.equal(gm.inner.running_mean, torch.zeros(5))


def _after(tuned: nn.Module, x: torch.Tensor) -> torch.Tensor:
    tuned.train()(x)
    mean: torch.Tensor = tuned.base_model.model.inner.modules_to_save.default.running_mean
    return mean


def test_statistics_swap_where_a_slot_can_stand(tmp_path: Path) -> None:
    net, x = Net(nn.BatchNorm1d(5)).eval(), torch.randn(7, 2, 3)
    want = saved(net, tmp_path / "a")(x).detach()
    adapter = lora_fx.load_adapter(tmp_path / "a", base=net)
    gm, model, file = lora_fx.trace(net, (x,)), tmp_path / "m.onnx", tmp_path / "a.onnx_adapter"
    slots = lora_fx.export.slots_for(gm, [adapter])
    assert "inner.running_mean" in slots
    assert "inner.num_batches_tracked" not in slots
    lora_fx.to_onnx(gm, model, adapters="input", slots=slots, verify=False)
    lora_fx.export_adapter(adapter, model, file)
    [got] = lora_fx.Session(model).run({"x": x}, adapter=file).values()
    assert compare(torch.tensor(got), want).ok

    closed = lora_fx.trace(net, (x,), frontend="symbolic")
    for graph, wanted in ((closed, slots), (lora_fx.inject(closed, adapter), None)):
        with pytest.raises(ExportError, match=r"inner\.running_mean.* lies in a module .* inputs"):
            lora_fx.to_onnx(graph, tmp_path / "n.onnx", adapters="input", slots=wanted)
    assert not (tmp_path / "n.onnx").exists()
