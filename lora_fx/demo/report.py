"""The demo's result as one table."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from lora_fx.demo.forms import Row
from lora_fx.demo.job import Result
from lora_fx.demo.scoring import gain

_WIDTH = 110


def table(result: Result) -> str:
    """What a person reads: every form, then whether the adapters matter, then the files."""
    subjects = list(result.rows[0].scores)
    columns = ["form", "weights", *(f"{name}, %" for name in subjects)]
    shown = Table(title="accuracy on held-out docstrings, by form", title_justify="left")
    for column in [*columns, "max error", "size, MB", "latency"]:
        shown.add_column(column, justify="left" if column in ("form", "weights") else "right")
    for row in result.rows:
        shown.add_row(*_cells(row, subjects))
    text = io.StringIO()
    console = Console(file=text, width=_WIDTH)
    console.print(shown)
    for line in [*_notes(result), *(effect(result, name) for name in subjects)]:
        console.print(line, highlight=False, soft_wrap=True)
    return text.getvalue().rstrip()


def effect(result: Result, subject: str) -> str:
    """How far an adapter moves its own subject's score, in paired standard errors."""
    base = result.row("eager", "base").scores[subject]
    adapted = result.row("eager + PEFT", subject).scores[subject]
    points, error = gain(base, adapted)
    return (
        f"{subject}: {base} % by the base, {adapted} % by its adapter, on {base.total} texts: "
        f"{100 * points:+.1f} ± {100 * error:.1f} points, paired: "
        f"{points / error:.1f} standard errors"
    )


def _cells(row: Row, subjects: list[str]) -> list[str]:
    size = " + ".join(f"{size / 1e6:.1f}" for size in row.sizes)
    error = "" if row.form.startswith("eager") else f"{row.max_error:.1e}"
    scores = [str(row.scores.get(subject, "")) for subject in subjects]
    return [row.form, row.weights, *scores, error, size, f"{row.latency:.2f}"]


def _notes(result: Result) -> list[str]:
    return [
        "accuracy ± binomial standard error; max error of hidden states against eager; latency on "
        "one thread, over merged",
        "the training recipes were chosen on another split of the same modules' docstrings",
        f"adapters, models and result.json are in {result.out}/",
    ]
