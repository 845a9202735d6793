"""A model with names that are not harmless, exported in each mode once."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.export import ExportReport, to_onnx
from lora_fx.testing import make_adapter

HOSTILE = "<script>alert(1)</script>&amp;"


class Hostile(nn.Module):
    """Two blocks whose layers are called as nobody should call them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({HOSTILE: nn.Linear(6, 6)}) for _ in range(2)])
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., 6) -> (..., 4)."""
        for block in self.blocks:
            x = torch.tanh(block[HOSTILE](x))
        y: torch.Tensor = self.head(x)
        return y


class Page(NamedTuple):
    """An export, its report and its page."""

    report: ExportReport
    file: Path
    html: str


PATHS = {f"blocks.{n}.{HOSTILE}": (6, 6) for n in range(2)} | {"head": (4, 6)}


@pytest.fixture(scope="session", params=["merged", "unmerged", "swappable"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Page:
    torch.manual_seed(0)
    mode, place = request.param, tmp_path_factory.mktemp("page")
    gm = lora_fx.trace(Hostile().eval(), (torch.randn(3, 6),), frontend="symbolic")
    tuned = lora_fx.inject(gm, make_adapter(PATHS, rank=3, scale=0.1))
    adapters = "input" if mode == "swappable" else "constant"
    given = lora_fx.fold(tuned) if mode == "merged" else tuned
    file = place / "page.html"
    report = to_onnx(
        given, place / "model.onnx", adapters=adapters, output_names=[HOSTILE], report=file
    )
    assert report.mode == mode
    return Page(report, file, file.read_text(encoding="utf-8"))
