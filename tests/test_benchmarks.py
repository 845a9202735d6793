"""Benchmarks run: each once and small, for what they call, and not for how long it takes."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator

import pytest
from transformers.utils import logging

from benchmarks import growth, layers, merge, notebook, parts, path, pieces, siblings
from benchmarks.layers import Size

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 64}
Rows = dict[str, dict[str, float]]
EACH: dict[str, Callable[[], Rows]] = {
    "layers": lambda: layers.run([Size(16, 24, 2)], rounds=1),
    "parts": lambda: parts.run([Size(16, 24, 2)], rounds=1),
    "pieces": lambda: pieces.run(rounds=1),
    "siblings": lambda: siblings.run((32,), (1,), rounds=1),
    "notebook": lambda: notebook.measure(16, 24, (2,), 1),
    "path": lambda: path.run({"small": 1}, **SMALL),
    "merge": lambda: merge.run({"small": 1}, repeats=1, **SMALL),
    "passes": lambda: growth.passes((50, 100), repeats=1),
    "exports": lambda: growth.exports((1, 2), repeats=1),
}


@pytest.fixture(autouse=True)
def left_as_found() -> Iterator[None]:
    """A process of their own is what they reckon with."""
    shown = logging.is_progress_bar_enabled()
    yield
    gc.unfreeze()
    if shown:
        logging.enable_progress_bar()


@pytest.mark.parametrize("name", EACH)
def test_it_runs(name: str) -> None:
    rows = EACH[name]()
    assert rows
    assert all(row and all(math.isfinite(value) for value in row.values()) for row in rows.values())
