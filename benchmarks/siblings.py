"""Query, key and value: three layers that read one x, with a shrink each and with one for all."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

import lora_fx
from benchmarks.files import adapter_for, agree, caller, runner, session, write
from benchmarks.timing import columns, ratios
from lora_fx.branch_lowering.cost import LayerShape

FORMS = {"merged": True, "separate": False, "shared": True}


class Projections(nn.Module):
    """Three linear layers beside each other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All three of one x."""
        return self.query(x), self.key(x), self.value(x)


def measure(
    width: int, rank: int, rows: tuple[int, ...], rounds: int
) -> dict[str, dict[str, float]]:
    """Separate and shared over merged, and shared over separate."""
    torch.manual_seed(0)
    shapes = ({0: "batch", 1: "length"},)
    x = torch.randn(2, 7, width)
    gm = lora_fx.trace(Projections(width).eval(), (x,), dynamic_shapes=shapes)
    adapter = adapter_for(gm, rank)
    with tempfile.TemporaryDirectory() as directory:
        opened = {}
        for name, share in FORMS.items():
            path = Path(directory) / f"{name}.onnx"
            write(gm, adapter, "merged" if name == "merged" else "chosen", path, share)
            opened[name] = session(path)
    found = {}
    for count in rows:
        array = np.random.default_rng(count).standard_normal((1, count, width), np.float32)
        agree({name: caller(opened[name], {"x": array}) for name in FORMS})
        runs = {name: runner(opened[name], {"x": array}) for name in FORMS}
        over = ratios(runs, "merged", rounds)
        pair = {name: runs[name] for name in ("separate", "shared")}
        beside = ratios(pair, "separate", rounds)["shared"]
        allowed = {"allowed": 1 + 1.3 * LayerShape(count, width, width, rank).rho + 0.03}
        row = allowed | columns(over) | columns({"shared / separate": beside})
        found[f"3 x {width}, r {rank}, n {count}"] = row
    return found


def run(
    widths: tuple[int, ...] = (384, 768),
    rows: tuple[int, ...] = (1, 16, 64, 256),
    rounds: int = 31,
) -> dict[str, dict[str, float]]:
    """Every width in turn."""
    found: dict[str, dict[str, float]] = {}
    for width in widths:
        found |= measure(width, 8, rows, rounds)
    return found
