"""What an export tells of its graph: layers, pictures of each kind, and what was left and why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.export import to_onnx
from lora_fx.testing import Ragged, make_adapter


class Mixed(nn.Module):
    """A linear layer, a convolution whose groups LoRA mixes, which fold leaves beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, groups=2)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(torch.tanh(self.conv(x)).transpose(1, 2))
        return y


def test_a_merged_export_says_what_stays_beside_and_why(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gm = lora_fx.trace(Mixed().eval(), (torch.randn(2, 4, 9),))
    tuned = lora_fx.inject(gm, make_adapter({"conv": (6, 4, 3), "fc": (5, 6)}, scale=0.1))
    report = to_onnx(lora_fx.fold(tuned), tmp_path / "model.onnx", measure=True)
    assert [(fact.path, fact.form) for fact in report.layers] == [
        ("conv", "factored"),
        ("fc", "merged"),
    ]
    assert list(report.left) == ["conv"]
    assert report.left["conv"]
    assert "not folded" not in report.left["conv"]
    stages = {picture.path: [s.title for s in picture.stages] for picture in report.pictures}
    assert stages == {
        "conv": ["the model", "with its adapter"],
        "fc": ["the model", "with its adapter", "in the file"],
    }
    assert str(report.pictures[1].stages[0]) == str(report.pictures[1].stages[2])


def test_what_was_not_folded_is_left_for_that_reason(
    ragged: Ragged, x: torch.Tensor, tmp_path: Path
) -> None:
    tuned = lora_fx.inject(lora_fx.trace(ragged, (x,)), make_adapter({"wide": (5, 3)}))
    report = to_onnx(tuned, tmp_path / "model.onnx", measure=True)
    assert report.left == {"wide": "the graph was not folded, which would merge it"}


@pytest.mark.parametrize("with_adapter", [True, False])
def test_a_swappable_export_draws_its_slots(
    with_adapter: bool, ragged: Ragged, x: torch.Tensor, tmp_path: Path
) -> None:
    gm = lora_fx.trace(ragged, (x,))
    given = lora_fx.inject(gm, make_adapter({"wide": (5, 3)})) if with_adapter else gm
    report = to_onnx(given, tmp_path / "model.onnx", adapters="input", slots=["wide"], measure=True)
    assert [fact.form for fact in report.layers] == ["slot, weight"] * with_adapter
    (picture,) = report.pictures
    assert picture.title.startswith("linear with lora, slot" if with_adapter else "linear, a slot")
    assert [stage.title for stage in picture.stages] == ["the model", "in the file"]
    assert "lora_A, a slot" in str(picture.stages[1])
    assert "lora" not in str(picture.stages[0])


def test_without_being_asked_an_export_measures_nothing(
    ragged: Ragged, x: torch.Tensor, tmp_path: Path
) -> None:
    tuned = lora_fx.inject(lora_fx.trace(ragged, (x,)), make_adapter({"wide": (5, 3)}))
    report = to_onnx(tuned, tmp_path / "model.onnx")
    assert (report.layers, report.pictures, report.left) == ([], [], {})
    assert "measure" not in report.seconds
