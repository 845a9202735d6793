"""How passes grow from 1,000 to 64,000 nodes, and an export from 4 to 64 layers."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lora_fx import Adapter, Update, fold, inject, trace, unfold
from lora_fx.affine.transfer import analyse
from lora_fx.export import to_onnx
from lora_fx.passes import ChooseForm

WIDTH, RANK = 8, 2
NODES = (1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000)
LAYERS = (4, 8, 16, 32, 64)


class Deep(nn.Module):
    """Linear layers with nine non-affine calls behind each: one site in ten nodes."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Adds a little of each layer's output: no two are affine together, and none is lost."""
        for layer in self.layers:
            y = layer(x)
            for _ in range(3):
                y = torch.tanh(torch.sin(y))
            x = x + 0.02 * y
        return x


def adapter_for(layers: int) -> Adapter:
    """One update a layer."""
    make = torch.Generator().manual_seed(0)
    updates = {
        f"layers.{index}": Update(
            torch.randn(RANK, WIDTH, generator=make), torch.randn(WIDTH, RANK, generator=make), 0.05
        )
        for index in range(layers)
    }
    return Adapter("bench", updates)


def steps(layers: int) -> dict[str, Callable[[], object]]:
    """What is timed, on a graph of ten nodes a layer; torch's own recompile is the yardstick."""
    gm = trace(Deep(layers))
    adapter = adapter_for(layers)
    injected = inject(gm, adapter)
    folded = fold(injected)
    return {
        "inject": lambda: inject(gm, adapter),
        "analyse": lambda: analyse(injected),
        "choose a form": lambda: ChooseForm()(injected),
        "fold": lambda: fold(injected),
        "unfold": lambda: unfold(folded),
        "torch's recompile": gm.recompile,
    }


def seconds(step: Callable[[], object]) -> float:
    """Processor time of one call.

    Without garbage collection, as timeit does: its cost is that of everything else in the process.
    """
    gc.collect()
    gc.disable()
    start = time.process_time()
    step()
    taken = time.process_time() - start
    gc.enable()
    return taken


def passes(nodes: tuple[int, ...] = NODES, repeats: int = 3) -> dict[str, dict[str, float]]:
    """Each size beside the one before it, in turn, so that a slow moment meets both.

    Returns:
        Median seconds by pass at each size, and the median of the ratios to half the size.
    """
    gc.freeze()  # what is there already is not looked through again at each measurement
    rows: dict[str, dict[str, float]] = {}
    small = steps(nodes[0] // 10)
    rows[f"{nodes[0]:,} nodes"] = {name: seconds(step) for name, step in small.items()}
    for count in nodes[1:]:
        large = steps(count // 10)
        pairs = {
            name: [(seconds(small[name]), seconds(large[name])) for _ in range(repeats)]
            for name in small
        }
        median = statistics.median
        rows[f"{count:,} nodes"] = {n: median(two for _, two in p) for n, p in pairs.items()}
        ratio = {name: median(two / one for one, two in p) for name, p in pairs.items()}
        rows[f"{count:,} / {count // 2:,}"] = ratio
        small = large
    return rows


def exports(layers: tuple[int, ...] = LAYERS, repeats: int = 3) -> dict[str, dict[str, float]]:
    """Seconds by stage of a verified export of a graph with an adapter, and the ratios."""
    rows: dict[str, dict[str, float]] = {}
    before: dict[str, float] = {}
    for count in layers:
        found = [_export(count) for _ in range(repeats)]
        now = {stage: statistics.median(one[stage] for one in found) for stage in found[0]}
        rows[f"{count} layers"] = now
        if before:
            ratios = {stage: now[stage] / before[stage] for stage in now}
            rows[f"{count} / {count // 2}"] = ratios
        before = now
    return rows


def _export(layers: int) -> dict[str, float]:
    torch.manual_seed(0)
    shapes = ({0: "batch", 1: "length"},)
    gm = trace(Deep(layers).eval(), (torch.randn(2, 7, WIDTH),), dynamic_shapes=shapes)
    injected = inject(gm, adapter_for(layers))
    with tempfile.TemporaryDirectory() as directory:
        report = to_onnx(injected, Path(directory) / "model.onnx")
    return report.seconds | {"total": sum(report.seconds.values())}
