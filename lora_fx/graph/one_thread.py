"""One thread: of torch's own, where operators are too small for more; and of those that call us."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import RLock

import torch

from lora_fx.choices import P, R

_turn = RLock()


def _renew() -> None:
    """A lock that nobody holds: the thread that may have held it is none of a child's."""
    global _turn
    _turn = RLock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew)


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch to one thread in the body; the number is the whole process's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """Lets one thread in at a time: what torch.export patches meanwhile is the whole process's."""

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        with _turn:
            return function(*args, **kwargs)

    return called
