"""Latencies that can be compared: one thread, one call at a time, in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from lora_fx.demo.encoder import Batch
from lora_fx.demo.forms import Form
from lora_fx.graph.one_thread import one_thread

ROUNDS = 7


def latencies(forms: Sequence[Form], batch: Batch, rounds: int = ROUNDS) -> list[float]:
    """Median seconds of each form for one batch.

    Forms run in turn within each round, so a slow moment of the machine meets all of them.
    """
    times: list[list[float]] = [[] for _ in forms]
    with one_thread():
        for turn in range(rounds + 1):
            for place, form in enumerate(forms):
                start = time.perf_counter()
                form.encode(batch)
                if turn:  # the first only warms up
                    times[place].append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]
