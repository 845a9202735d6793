"""The form of many notebooks, ``linear(x) + s * x @ (a @ b).T``: as written, and as exported."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

import lora_fx
from benchmarks.files import agree, as_written, caller, runner, session
from benchmarks.timing import columns, ratios
from lora_fx.export import to_onnx

RANK = 8


class Notebook(nn.Module):
    """A linear layer whose update is multiplied out at each call."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(into, out)
        self.a = nn.Parameter(torch.randn(out, RANK) / RANK**0.5)
        self.b = nn.Parameter(torch.randn(RANK, into) / into**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The base and what is added."""
        y: torch.Tensor = self.linear(x) + 2.0 * (x @ (self.a @ self.b).T)
        return y


def measure(into: int, out: int, rows: tuple[int, ...], rounds: int) -> dict[str, dict[str, float]]:
    """As written over ours; ours, and merged, over the base alone."""
    torch.manual_seed(0)
    model, shapes = Notebook(into, out).eval(), ({0: "batch", 1: "length"},)
    x = torch.randn(2, 7, into)
    gm = lora_fx.trace(model, (x,), dynamic_shapes=shapes)
    base = lora_fx.trace(nn.Sequential(model.linear).eval(), (x,), dynamic_shapes=shapes)
    opened = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, graph in (("merged", lora_fx.fold(gm)), ("base", base), ("ours", gm)):
            to_onnx(graph, Path(directory) / f"{name}.onnx", verify=False)
            opened[name] = session(Path(directory) / f"{name}.onnx")
        with as_written():
            to_onnx(gm, Path(directory) / "written.onnx", verify=False)
        opened["as written"] = session(Path(directory) / "written.onnx")
    found = {}
    for count in rows:
        array = np.random.default_rng(count).standard_normal((1, count, into), np.float32)
        feeds = {name: {one.get_inputs()[0].name: array} for name, one in opened.items()}
        agree({n: caller(one, feeds[n]) for n, one in opened.items() if n != "base"})
        runs = {name: runner(one, feeds[name]) for name, one in opened.items()}
        faster = ratios({n: runs[n] for n in ("as written", "ours")}, "ours", rounds)["as written"]
        over = ratios({n: runs[n] for n in ("base", "ours", "merged")}, "base", rounds)
        named = {"as written / ours": faster, "ours / base": over["ours"]}
        row = columns(named | {"merged / base": over["merged"]})
        found[f"{into} -> {out}, r {RANK}, n {count}"] = row
    return found


def run(
    rows: tuple[int, ...] = (1, 16, 256, 4096), rounds: int = 31
) -> dict[str, dict[str, float]]:
    """The notebook's own size, and a square one."""
    return measure(768, 512, rows, rounds) | measure(768, 768, rows, rounds)
