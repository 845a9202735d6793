"""What `export_adapter` says of what it wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapters.adapter import Adapter
from lora_fx.testing import make_adapter


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(3, 5, 2), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.conv(x).mean(-1))
        return out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("model") / "model.onnx"
    gm = lora_fx.trace(Small().eval(), (torch.randn(2, 3, 6),))
    slots = {"conv": "factors", "head": "factors", "head.bias": "weight"}
    lora_fx.to_onnx(gm, file, adapters="input", slots=slots, verify=False)  # type: ignore[arg-type]
    return file


def test_slots_are_filled_with_a_rank_or_whole_or_left(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "french.onnx_adapter"
    adapter = make_adapter({"head": (4, 5)}, rank=3)
    whole = replace(adapter, replacements={"head.bias": torch.ones(4)})
    report = lora_fx.export_adapter(whole, model, out)
    assert [(slot.path, slot.rank, slot.dtype, slot.size) for slot in report.filled] == [
        ("head", 3, "float32", 4 * 3 * (5 + 4)), ("head.bias", None, "float32", 16),
    ]  # fmt: skip
    assert list(report.left) == ["conv"]
    assert (report.adapter, report.format, report.model) == ("french", "onnx_adapter", str(model))
    assert report.size == out.stat().st_size
    first, *lines = str(report).split("\n")
    assert first == (f"{out}  adapter french for {model}  {report.size} bytes  2 of 3 slots filled")
    assert lines == [
        "  head  rank 3  float32  108 bytes", "  head.bias  whole  float32  16 bytes",
        "  as the base: conv",
    ]  # fmt: skip
    assert repr(report) == str(report)
    assert "<td>as the base</td>" in report._repr_html_()
    assert json.loads(json.dumps(report.to_dict()))["left"] == ["conv"]


@pytest.mark.parametrize("adapter", [None, Adapter("nothing", {})])
def test_no_adapter_fills_none(adapter: Adapter | None, model: Path, tmp_path: Path) -> None:
    report = lora_fx.export_adapter(adapter, model, tmp_path / "none.safetensors")
    assert list(report.filled) == []
    assert list(report.left) == ["conv", "head", "head.bias"]
    assert report.format == "safetensors"
    assert ("no adapter for" in str(report)) is (adapter is None)


def test_an_update_that_was_never_trained_has_a_rank(model: Path, tmp_path: Path) -> None:
    """B is zero, and the file holds it."""
    up, down = torch.zeros(4, 2), torch.ones(2, 5)
    adapter = Adapter("fresh", {"head": lora_fx.Update(down, up, 1.0)})
    report = lora_fx.export_adapter(adapter, model, tmp_path / "fresh.onnx_adapter")
    assert [slot.rank for slot in report.filled] == [2]
