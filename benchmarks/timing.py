"""Ratios that can be compared: one thread, in turn within one run, medians and quartiles.

What is timed is the processor time of the thread that calls: on a machine with other work, the
time that this takes is no part of it.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Run = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """What was measured several times.

    Attributes:
        median: half of the measurements are below.
        low: a quarter of them are.
        high: three quarters are.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The median and the quartiles of some values."""
        if len(values) == 1:
            return cls(*values * 3)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def seconds(run: Run, calls: int = 1) -> float:
    """Processor time of one call, after one that only warms up, without garbage collection."""
    run()
    gc.disable()
    start = time.thread_time()
    for _ in range(calls):
        run()
    taken = time.thread_time() - start
    gc.enable()
    return taken / calls


def medians(runs: Mapping[str, Run], rounds: int, calls: int) -> dict[str, float]:
    """Seconds of one call of each: the median over rounds, in each of which all are measured."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, values in found.items():
            values.append(seconds(runs[name], calls))
    return {name: statistics.median(values) for name, values in found.items()}


def ratios(
    runs: Mapping[str, Run], base: str, rounds: int = 31, block: float = 0.002
) -> dict[str, Spread]:
    """Each over the base, the two in turn and nothing between: what is slow for a while meets both.

    A third run between them would leave the caches to whichever is measured more often.

    Args:
        runs: what to call, by name.
        base: the name of what the others are divided by.
        rounds: how often each is measured.
        block: seconds for which one is called over and over.
    """
    calls = max(1, int(block / seconds(runs[base])))
    found: dict[str, list[float]] = {name: [] for name in runs if name != base}
    for name, values in found.items():
        for _ in range(rounds):
            least = seconds(runs[base], calls)
            values.append(seconds(runs[name], calls) / least)
    return {name: Spread.of(values) for name, values in found.items()}


def columns(found: Mapping[str, Spread]) -> dict[str, float]:
    """The median and the quartiles of each, as columns of one row."""
    row = {}
    for name, spread in found.items():
        row |= {name: spread.median, f"{name} low": spread.low, f"{name} high": spread.high}
    return row
