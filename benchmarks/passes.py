"""How the passes grow with the graph: 1,000 injections in 10,000 nodes, and twice that."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch import fx, nn

from lora_fx import Adapter, Update, fold, inject, trace, unfold

WIDTH, RANK = 8, 2


class Deep(nn.Module):
    """Linear layers with nine non-affine calls behind each: one site in ten nodes."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mixes each layer's output with itself, so that no two layers are affine together."""
        for layer in self.layers:
            x = layer(x)
            for _ in range(4):
                x = torch.tanh(torch.sin(x))
        return x


def adapter_for(layers: int) -> Adapter:
    """One update a layer."""
    make = torch.Generator().manual_seed(0)
    updates = {
        f"layers.{index}": Update(
            torch.randn(RANK, WIDTH, generator=make), torch.randn(WIDTH, RANK, generator=make), 1.0
        )
        for index in range(layers)
    }
    return Adapter("bench", updates)


def seconds(step: Callable[[], fx.GraphModule], repeats: int = 5) -> tuple[float, fx.GraphModule]:
    """The median processor time of a step, and its last result.

    Without garbage collection, as timeit does: its cost is that of everything else in the process.
    """
    times = []
    gc.disable()
    for _ in range(repeats):
        start = time.process_time()
        result = step()
        times.append(time.process_time() - start)
    gc.enable()
    return statistics.median(times), result


def measure(layers: int) -> dict[str, float]:
    """Times each pass on a graph of ten nodes a layer."""
    gm = trace(Deep(layers))
    adapter = adapter_for(layers)
    inject_time, injected = seconds(lambda: inject(gm, adapter))
    fold_time, folded = seconds(lambda: fold(injected))
    unfold_time, _ = seconds(lambda: unfold(folded))
    recompile_time, _ = seconds(lambda: recompiled(gm))
    return {
        "nodes": float(len(gm.graph.nodes)),
        "inject": inject_time,
        "fold": fold_time,
        "unfold": unfold_time,
        "torch's recompile": recompile_time,
    }


def recompiled(gm: fx.GraphModule) -> fx.GraphModule:
    """What torch alone needs to make code of a graph: the yardstick of the machine."""
    gm.recompile()
    return gm


def run() -> dict[str, dict[str, float]]:
    """Measures at 1,000 and 2,000 layers.

    Returns:
        Seconds by pass at each size, and the ratio of the two.
    """
    one, two = measure(1000), measure(2000)
    ratios = {name: two[name] / one[name] for name in one}
    return {"1000 layers": one, "2000 layers": two, "ratio": ratios}
