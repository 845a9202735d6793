"""How the passes grow with the graph: 1,000 injections in 10,000 nodes, and twice that."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from lora_fx import Adapter, Update, fold, inject, trace, unfold
from lora_fx.affine.transfer import analyse

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


def steps(layers: int) -> dict[str, Callable[[], object]]:
    """What is timed, on a graph of ten nodes a layer; torch's own recompile is the yardstick."""
    gm = trace(Deep(layers))
    adapter = adapter_for(layers)
    injected = inject(gm, adapter)
    folded = fold(injected)
    return {
        "inject": lambda: inject(gm, adapter),
        "inject and compile": lambda: inject(gm, adapter).code,
        "analyse": lambda: analyse(injected),
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


def run(repeats: int = 7) -> dict[str, dict[str, float]]:
    """Measures both sizes in turn, so that a slow moment of the machine meets both.

    Returns:
        Median seconds by pass at each size, and the median of the ratios of neighbours.
    """
    small, large = steps(1000), steps(2000)
    pairs = {name: [(seconds(small[name]), seconds(large[name]))] for name in small}
    for _ in range(repeats - 1):
        for name, measured in pairs.items():
            measured.append((seconds(small[name]), seconds(large[name])))
    median = statistics.median
    return {
        "1,000 of 10,000 nodes": {n: median(one for one, _ in p) for n, p in pairs.items()},
        "2,000 of 20,000 nodes": {n: median(two for _, two in p) for n, p in pairs.items()},
        "ratio": {n: median(two / one for one, two in p) for n, p in pairs.items()},
    }
