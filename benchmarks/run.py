"""Runs every benchmark: one thread, a table on the terminal, the numbers in a JSON file."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import merge, passes

OUT = Path(__file__).parent / "out"


def table(title: str, rows: dict[str, dict[str, float]]) -> Table:
    """One row a measurement."""
    columns = list(next(iter(rows.values())))
    result = Table(title=title)
    for column in ("", *columns):
        result.add_column(column, justify="right")
    for name, row in rows.items():
        result.add_row(name, *(f"{row[column]:.3g}" for column in columns))
    return result


def main() -> None:
    """Measures, prints, and writes ``benchmarks/out/bench.json``."""
    torch.set_num_threads(1)
    console = Console()
    results = {"passes": passes.run()}
    console.print(table("passes: processor seconds, medians of 7 pairs", results["passes"]))
    results["merge"] = merge.run()
    console.print(table(f"an adapter of rank {merge.RANK} into a checkpoint", results["merge"]))
    OUT.mkdir(exist_ok=True)
    machine = {"torch": torch.__version__, "python": platform.python_version()}
    text = json.dumps({"machine": machine, "results": results}, indent=2)
    (OUT / "bench.json").write_text(text + "\n")
    console.print(
        f"written to {OUT.relative_to(Path.cwd()) if OUT.is_relative_to(Path.cwd()) else OUT}"
    )


if __name__ == "__main__":
    main()
