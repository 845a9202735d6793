"""Loading a session and changing its adapter, beside onnxruntime's own loading."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.files import adapter_for, session, write
from benchmarks.models import MODELS, RANK
from benchmarks.timing import Spread
from lora_fx.export import Session, export_adapter


def run(model: str = "MiniLM", repeats: int = 9) -> dict[str, dict[str, float]]:
    """Milliseconds: medians and quartiles."""
    gm = MODELS[model]()
    first, second = (adapter_for(gm, RANK, seed) for seed in (0, 1))
    ids = np.random.default_rng(0).integers(1000, 4000, (1, 16))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        paths = {form: directory / f"{form}.onnx" for form in ("merged", "swappable")}
        for form, path in paths.items():
            write(gm, first, form, path)
        adapters = [directory / "first.onnx_adapter", directory / "second.onnx_adapter"]
        for adapter, path in zip((first, second), adapters, strict=True):
            export_adapter(adapter, paths["swappable"], path)
        swapping = Session(paths["swappable"], threads=1)

        def fresh() -> None:
            swapping.run(inputs, adapter=adapters[0])

        def forget() -> None:
            swapping._adapters.clear()

        steps: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "onnxruntime loads the merged file": (lambda: session(paths["merged"]), _nothing),
            "Session loads the merged file": (lambda: Session(paths["merged"], 1), _nothing),
            "Session loads the swappable file": (lambda: Session(paths["swappable"], 1), _nothing),
            "a run of the base": (lambda: swapping.run(inputs), _nothing),
            "a run with an adapter that is new": (fresh, forget),
            "a run with an adapter that is loaded": (fresh, fresh),
            "a run with the other adapter": (
                lambda: swapping.run(inputs, adapter=adapters[1]),
                fresh,
            ),
        }
        found: dict[str, list[float]] = {step: [] for step in steps}
        for _ in range(repeats):
            for step, (call, before) in steps.items():
                before()
                start = time.perf_counter()
                call()
                found[step].append(1e3 * (time.perf_counter() - start))
    spreads = {step: Spread.of(values) for step, values in found.items()}
    return {s: {"ms": v.median, "low": v.low, "high": v.high} for s, v in spreads.items()}


def _nothing() -> None:
    pass
