"""Runs every benchmark: one thread, a table on the terminal, the numbers in a JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started from here, too
sys.path.insert(0, str(Path(__file__).parent.parent))

import onnxruntime
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import (
    base,
    growth,
    layers,
    merge,
    models,
    notebook,
    parts,
    path,
    peers,
    pieces,
    siblings,
    swap,
)

OUT = Path(__file__).parent / "out"
Rows = dict[str, dict[str, float]]
# Of Qwen2's architecture, and small enough for the quick run.
_SMALL = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
_SMALL |= {"vocab_size": 8000}

FULL: dict[str, tuple[str, Callable[[], Rows]]] = {
    "layers": ("one layer, time over the merged one", layers.run),
    "parts": ("the calls of an augmented layer, time over the merged one", parts.run),
    "pieces": ("what the cost model is made of", pieces.run),
    "siblings": ("query, key and value, time over merged", siblings.run),
    "models": ("adapters on all linear layers, time over merged", models.run),
    "encoder": ("the base graph over optimum's fastest file", lambda: base.run("encoder")),
    "decoder": ("the base graph over genai's builder's file", lambda: base.run("decoder")),
    "packed": ("the same in 4 bits, with an adapter", lambda: base.run("packed")),
    "notebook": ("x @ (a @ b).T, ratios of time", notebook.run),
    "path": ("from disk to ONNX: seconds by stage, MB", path.run),
    "peers": ("from disk to ONNX, whole processes, beside others'", peers.run),
    "merge": ("an adapter into a checkpoint, beside PEFT", merge.run),
    "passes": ("passes: processor seconds, and ratios to half the size", growth.passes),
    "exports": ("verified exports: seconds, and ratios to half the size", growth.exports),
    "swap": ("sessions and adapters: milliseconds", swap.run),
}
QUICK: dict[str, Callable[[], Rows]] = {
    "layers": lambda: layers.run(layers.QUICK, rounds=11),
    "parts": lambda: parts.run(layers.QUICK[:1], rounds=9),
    "pieces": lambda: pieces.run(rounds=9),
    "siblings": lambda: siblings.run((384,), (1, 256), rounds=15),
    "models": lambda: models.run(("MiniLM",), rounds=5),
    "encoder": lambda: base.run("encoder", rounds=7),
    "decoder": lambda: base.run("decoder", rounds=3),
    "packed": lambda: base.run("packed", rounds=3),
    "notebook": lambda: notebook.run((16, 256), rounds=9),
    "path": lambda: path.run({"0.01B": 4}, **_SMALL),
    "peers": lambda: peers.run({"0.01B": (256, 4)}),
    "merge": lambda: merge.run({"0.01B": 4}, repeats=1, **_SMALL),
    "passes": lambda: growth.passes((1_000, 2_000, 4_000), repeats=3),
    "exports": lambda: growth.exports((4, 8), repeats=1),
    "swap": lambda: swap.run(repeats=3),
}


def table(title: str, rows: Rows) -> Table:
    """One row a measurement; quartiles stand behind their median."""
    columns = [name for name in next(iter(rows.values())) if not _is_quartile(name, rows)]
    result = Table(title=title)
    for column in ("", *columns):
        result.add_column(column, justify="right")
    for name, row in rows.items():
        result.add_row(name, *(_shown(row, column) for column in columns))
    return result


def _is_quartile(name: str, rows: Rows) -> bool:
    stem, _, end = name.rpartition(" ")
    return end in ("low", "high") and stem in next(iter(rows.values()))


def _shown(row: dict[str, float], column: str) -> str:
    median = f"{row[column]:.3g}" if row[column] < 1 else f"{row[column]:.4g}"
    if f"{column} low" not in row:
        return median
    return f"{median} ({row[f'{column} low']:.3g}-{row[f'{column} high']:.3g})"


def machine() -> dict[str, Any]:
    """What the numbers were measured with; they are ratios for a reason."""
    return {
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "threads": 1,
    }


def main() -> None:
    """Measures, prints, and writes ``benchmarks/out/bench.json`` or ``bench-quick.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    parser.add_argument("names", nargs="*", help=f"which: {', '.join(FULL)}")
    given = parser.parse_args()
    unknown = set(given.names) - FULL.keys()
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(FULL)}")
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # one core, and no moving
    console, results = Console(width=None if sys.stdout.isatty() else 160), {}
    for name in given.names or FULL:
        title, whole = FULL[name]
        start = time.perf_counter()
        results[name] = QUICK[name]() if given.quick else whole()
        console.print(table(title, results[name]))
        console.print(f"{name}: {time.perf_counter() - start:.0f} s\n")
    OUT.mkdir(exist_ok=True)
    file = OUT / ("bench-quick.json" if given.quick else "bench.json")
    text = json.dumps({"machine": machine(), "results": results}, indent=2)
    file.write_text(text + "\n")
    console.print(f"written to {file.relative_to(OUT.parent.parent)}")


if __name__ == "__main__":
    main()
