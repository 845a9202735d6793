"""Latencies that can be compared: one thread, one call at a time, in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from lora_fx.demo.encoder import Batch
from lora_fx.demo.forms import Form

ROUNDS = 9


def latencies(forms: Sequence[Form], batch: Batch, rounds: int = ROUNDS) -> list[float]:
    """Median seconds of each form for one batch.

    Forms run in turn within each round, so a slow moment of the machine meets all of them.
    """
    times: list[list[float]] = [[] for _ in forms]
    opened = [form.open(1) for form in forms]  # pools of threads would disturb each other
    with one_thread():
        for turn in range(rounds + 1):
            for place, encode in enumerate(opened):
                start = time.perf_counter()
                encode(batch)
                if turn:  # the first only warms up
                    times[place].append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch to one thread in the body."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
