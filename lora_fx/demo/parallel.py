"""Work shared out between two threads, each of which has one core to itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

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


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch to one thread in the body."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
