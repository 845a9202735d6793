"""One linear layer: each form over the merged one, beside the limit."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import lora_fx
from benchmarks.files import Active, adapter_for, agree, caller, runner, session, write
from benchmarks.timing import columns, ratios
from lora_fx.branch_lowering.cost import LayerShape

FORMS = ("merged", "chosen", "factored", "augmented", "swappable")


@dataclass(frozen=True)
class Size:
    """A layer d -> o with an adapter of rank r; the last two sizes do not fit in a cache."""

    d: int
    o: int
    r: int


QUICK = [Size(384, 384, 8), Size(384, 1536, 8), Size(1536, 384, 8), Size(768, 768, 8)]
FULL = [
    *QUICK,
    *(Size(768, 768, 32), Size(768, 3072, 8), Size(3072, 768, 8)),
    *(Size(2048, 2048, 16), Size(4096, 4096, 16)),
]
ROWS = (1, 16, 256)


def allowed(size: Size, rows: int) -> float:
    """What an unmerged layer may cost over the merged one."""
    rho = LayerShape(rows, size.d, size.o, size.r).rho
    return 1 + 1.3 * rho + (0.04 if rows >= 16 else 0.05)


def measure(size: Size, rounds: int) -> dict[str, dict[str, float]]:
    """All forms of one layer at each number of rows."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(size.d, size.o)).eval()
    shapes = ({0: "batch", 1: "length"},)
    gm = lora_fx.trace(layer, (torch.randn(2, 7, size.d),), dynamic_shapes=shapes)
    adapter = adapter_for(gm, size.r)
    with tempfile.TemporaryDirectory() as directory:
        paths = {form: Path(directory) / f"{form}.onnx" for form in FORMS}
        for form, path in paths.items():
            write(gm, adapter, form, path)
        opened = {form: session(path) for form, path in paths.items()}
        active = Active(adapter, paths["swappable"], Path(directory) / "adapter.onnx_adapter")
    rows = {}
    for count in ROWS:
        x = {"input": np.random.default_rng(count).standard_normal((1, count, size.d), np.float32)}
        called = {f: caller(opened[f], x, active if f == "swappable" else None) for f in FORMS}
        agree(called)
        found = ratios({f: runner(opened[f], x) for f in FORMS[:-1]}, "merged", rounds)
        found |= ratios({f: called[f] for f in ("merged", "swappable")}, "merged", rounds)
        limit = 1 + LayerShape(count, size.d, size.o, size.r).rho
        name = f"{size.d} -> {size.o}, r {size.r}, n {count}"
        rows[name] = {"limit": limit, "allowed": allowed(size, count)} | columns(found)
    return rows


def run(sizes: list[Size] = FULL, rounds: int = 61) -> dict[str, dict[str, float]]:
    """Every size in turn."""
    rows: dict[str, dict[str, float]] = {}
    for size in sizes:
        rows |= measure(size, rounds)
    return rows
