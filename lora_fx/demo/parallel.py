"""Work shared out between two threads, each of which has one core to itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from lora_fx.graph.one_thread import one_thread

CORES = 2
Item = TypeVar("Item")
Made = TypeVar("Made")


def side_by_side(work: Callable[[Item], Made], items: Iterable[Item]) -> list[Made]:
    """Calls a function on each item, two at a time, and gives the results in order.

    Operators of this size waste more than they win when two threads share one of them: each
    waits for the other at every step. So torch is kept to one thread, and batches run abreast.
    """
    with one_thread(), ThreadPoolExecutor(CORES) as pool:
        return list(pool.map(work, items))
