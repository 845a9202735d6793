"""Ctrl-C at any time: one line, exit code 130, and no traceback.

Python raises KeyboardInterrupt wherever it is just then. An import may make an ImportError of it,
and a destructor or a callback can raise nothing, so that it would be printed and lost. So it is
remembered that the signal came, and where it was lost it comes again. A library in C++ that is just
being loaded ends the process when anything is raised in it: while something is imported it waits.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import Any

INTERRUPTED = 130
_AGAIN = 0.05  # seconds, after which Python is elsewhere
_LONGEST = 20.0  # seconds that it waits for an import, which a busy machine may take
_came: list[float] = []  # when, each time


def has_come() -> bool:
    """Whether this command was interrupted, whatever was made of it since."""
    return bool(_came)


@contextmanager
def interruptible() -> Iterator[None]:
    """Ends with 130 where SIGINT came before the command was done."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # it is ignored, as of what a script runs in the background, or somebody else's
        return
    _came.clear()
    hook, sys.unraisablehook = sys.unraisablehook, _again(sys.unraisablehook)
    signal.signal(signal.SIGINT, _come)
    try:
        yield
    except BaseException as error:
        if not has_come():
            raise
        if not isinstance(error, SystemExit):  # of whoever has said so already
            print("error: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = hook
        _deaf_at_the_end()


def _come(_: int, frame: FrameType | None) -> None:
    _came.append(time.monotonic())
    if _imports(frame) and _came[-1] - _came[0] < _LONGEST:
        _send_again()
        return
    raise KeyboardInterrupt


def _imports(frame: FrameType | None) -> bool:
    """Whether something is being imported."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _send_again() -> None:
    again = threading.Timer(_AGAIN, os.kill, (os.getpid(), signal.SIGINT))
    again.daemon = True
    again.start()


def _again(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def tell(lost: Any) -> None:
        if lost.exc_type is KeyboardInterrupt:
            _send_again()
        else:
            hook(lost)

    return tell


@cache
def _deaf_at_the_end() -> None:
    """While Python ends there is nothing to interrupt, and it would print where it was."""
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
