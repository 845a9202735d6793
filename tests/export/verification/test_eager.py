from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from lora_fx.export import to_onnx
from lora_fx.export.program.shape_variants import Case
from lora_fx.export.verification.eager import evaluating, run_eager
from lora_fx.frontend.trace import trace
from lora_fx.graph.example import example_of
from lora_fx.testing import Computes

FRONTENDS = ("symbolic", "export")


def outputs(gm: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return run_eager(gm, Case("", (x,), {}))


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_evaluating_switches_dropout_off_in_a_copy(frontend: str) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.9)).train()
    x = torch.randn(4, 7, 3)
    gm = trace(model, (x,), frontend=frontend)
    copy = evaluating(gm)
    assert torch.equal(copy(x), model[0](x))
    assert not torch.equal(gm(x), model[0](x))  # control: the original still drops
    assert gm.training
    assert not copy.training
    assert copy.get_parameter("0.weight") is gm.get_parameter("0.weight")
    assert example_of(copy) is example_of(gm)


def calls(call: Callable[[torch.Tensor, bool], torch.Tensor]) -> nn.Module:
    """One function of the kind that takes the training flag as a number or by place."""
    return Computes(lambda m, x: call(x, m.training))


TRAINING: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(7),
    "batch norm without statistics": lambda: nn.BatchNorm1d(7, track_running_stats=False),
    "instance norm": lambda: nn.InstanceNorm1d(7, track_running_stats=True),
    "instance norm without statistics": lambda: nn.InstanceNorm1d(7),
    "dropout1d": lambda: nn.Dropout1d(0.5),
    "alpha dropout": lambda: nn.AlphaDropout(0.5),
    "feature alpha dropout": lambda: nn.FeatureAlphaDropout(0.5),
    "rrelu": lambda: nn.RReLU(),
    "lstm": lambda: nn.LSTM(3, 5, 2, dropout=0.5),
    "functions": lambda: calls(lambda x, on: F.alpha_dropout(F.dropout(x, 0.5, on), 0.5, on)),
    "builtins": lambda: calls(lambda x, on: torch.dropout(x, 0.5, on)),
    "attention": lambda: calls(
        lambda x, on: F.scaled_dot_product_attention(x, x, x, None, 0.5 if on else 0.0)
    ),
}


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", TRAINING)
def test_evaluating_switches_every_training_flag_off(name: str, frontend: str) -> None:
    model, x = nn.Sequential(TRAINING[name]()).train(), torch.randn(4, 7, 3)
    with torch.no_grad():
        gm = evaluating(trace(model, (x,), frontend=frontend))
        expected = pytree.tree_leaves(model.eval()(x))
        assert all(map(torch.equal, outputs(gm, x), expected))
        torch.manual_seed(0)
        trained = pytree.tree_leaves(model.train()(x))
    differs = not all(map(torch.equal, trained, expected))
    assert differs == (not name.endswith("without statistics"))  # control: the flag matters


class Writes(nn.Module):
    """Writes to its input, to a buffer, to a part of one, and to a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2, 3))
        self.scale = nn.Parameter(torch.ones(5), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        self.count.add_(1)
        self.last[0].copy_(x[0])
        self.scale.mul_(1.5)
        return self.fc(x) * self.scale + self.count + self.last.sum()


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_each_run_starts_alike_and_writes_to_copies(frontend: str) -> None:
    torch.manual_seed(0)
    model, x = Writes().eval(), torch.randn(4, 3)
    gm = trace(model, (x,), frontend=frontend)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = x.clone()
    (first,), (second,) = outputs(gm, x), outputs(gm, x)
    assert torch.equal(first, second)
    assert torch.equal(x, given)
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(first, model(x))
    assert not torch.equal(x, given)  # control: the model itself writes
    assert not torch.equal(model.count, before["count"])


class Notes(nn.Module):
    """Writes to its input, to a counter, and to a buffer that each call fills anew."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        self.count.add_(1)
        self.last.copy_(x)
        return self.fc(x) + self.last.sum()


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("adapters", ["constant", "input"])
def test_export_changes_neither_buffers_nor_inputs(
    adapters: str, frontend: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = Notes().eval(), torch.randn(4, 3)
    given, before = x.clone(), {n: v.clone() for n, v in model.state_dict().items()}
    gm = trace(model, (x,), frontend=frontend)
    assert to_onnx(gm, tmp_path / "model.onnx", adapters=adapters).verified
    assert torch.equal(x, given)
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    model(x)
    assert not any(torch.equal(before[n], model.state_dict()[n]) for n in ("count", "last"))


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_batch_norm_in_training_mode_is_exported_in_eval_mode(
    frontend: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)).train(), torch.randn(4, 3)
    before: dict[str, Any] = {n: v.clone() for n, v in model.state_dict().items()}
    report = to_onnx(trace(model, (x,), frontend=frontend), tmp_path / "model.onnx")
    assert report.verified
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    model(x)
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])  # control
