"""The hidden directory that files are written in, and what is left of one whose process died."""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

locks: Any = None
with suppress(ImportError):  # not on Windows, where leftovers stay
    locks = import_module("fcntl")

PREFIX = ".lora_fx-"
# What stands in a hidden directory: the draft; its files, while they move to their places, which
# are free; and what stood there.
NEW, MOVING, OLD = "new", "moving", "old"

# Those of this process that are not settled yet, who made them, and their locks.
_open: dict[Path, tuple[int, int | None]] = {}


@contextmanager
def hidden_directory(home: Path) -> Iterator[Path]:
    """A directory of its own in ``home``, locked for as long as it is used, and then gone.

    At the latest it goes when the process ends, wherever an interrupt came before.

    Raises:
        OSError: there can be none.
    """
    hidden = _made(home)
    try:
        yield hidden
    finally:
        try:
            _end(hidden)
        except BaseException:  # an interrupt that came meanwhile
            _end(hidden)
            raise


def sweep(home: Path) -> None:
    """Settles what processes that died have left in a directory; what is locked is in use."""
    try:
        found = [home / name for name in os.listdir(home) if name.startswith(PREFIX)]
    except OSError:
        return
    for hidden in found:
        with suppress(OSError):
            lock = _lock(hidden)
            if lock is not None:
                _settle(hidden)
                os.close(lock)


def put_in(hidden: Path, names: list[str], gone: list[str]) -> None:
    """Moves the files of a draft beside their hidden directory, all of them or none.

    What they replace is taken away first, so that at no time files of two sets stand together.
    Whoever finds the directory after this process died knows the set: the new one if its files
    were already moving, else the old.

    Args:
        hidden: the directory.
        names: of the draft's files, in their order.
        gone: what goes, beside what they replace.
    """
    home, (draft, moving, old) = hidden.parent, (hidden / part for part in (NEW, MOVING, OLD))
    taken = [name for name in reversed(names) if os.path.lexists(home / name)] + gone
    if len(names) == 1 and (not taken or (taken == names and (home / names[0]).is_file())):
        os.replace(draft / names[0], home / names[0])
        return
    old.mkdir()
    try:
        for name in taken:
            os.replace(home / name, old / name)
        os.rename(draft, moving)
        for name in names:
            os.replace(moving / name, home / name)
    except BaseException:
        _take_back(hidden, names)
        raise


def _take_back(hidden: Path, names: list[str]) -> None:
    """The new files, as far as they had moved; the old ones are settled."""
    moving = hidden / MOVING
    if not os.path.lexists(moving):
        return
    for name in names:
        if not os.path.lexists(moving / name):
            os.replace(hidden.parent / name, moving / name)
    os.rename(moving, hidden / NEW)  # last: whoever finds only some taken back moves them again


def _settle(hidden: Path) -> None:
    """Ends what was begun and removes the directory; nothing that has come since is replaced."""
    try:
        left = next((path for part in (MOVING, OLD) if (path := hidden / part).is_dir()), None)
        for file in [] if left is None else list(left.iterdir()):
            place = hidden.parent / file.name
            if not os.path.lexists(place):
                os.replace(file, place)
    except OSError:  # on a disk that takes no name any more: the next run puts it there
        return
    with suppress(OSError):  # one that rmtree meets while it closes a directory
        # What was replaced goes before that which says so.
        shutil.rmtree(hidden / OLD, ignore_errors=True)
        shutil.rmtree(hidden, ignore_errors=True)


def _made(home: Path) -> Path:
    while True:
        hidden = home / f"{PREFIX}{secrets.token_hex(8)}"
        _open[hidden] = os.getpid(), None  # before there is one: an interrupt may come at any time
        try:
            hidden.mkdir(0o700)
            with suppress(BlockingIOError, FileNotFoundError):  # somebody sweeps it, or has
                _open[hidden] = os.getpid(), _lock(hidden)
                if hidden.is_dir():
                    return hidden
        except BaseException:
            _end(hidden)
            raise
        _end(hidden)


def _end(hidden: Path) -> None:
    _settle(hidden)
    _, lock = _open.pop(hidden, (0, None))
    if lock is not None:
        with suppress(OSError):  # what it was for is done
            os.close(lock)


@atexit.register
def _end_all() -> None:
    for hidden in [hidden for hidden, (maker, _) in _open.items() if maker == os.getpid()]:
        _end(hidden)


def _lock(directory: Path) -> int | None:
    """Holds a directory until what is returned is closed, or the process ends.

    Returns:
        None on a filesystem, or a system, without locks.

    Raises:
        BlockingIOError: another holds it.
        OSError: it is no directory, or cannot be opened.
    """
    if locks is None:
        return None
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        locks.flock(lock, locks.LOCK_EX | locks.LOCK_NB)
    except OSError as problem:
        os.close(lock)
        if isinstance(problem, BlockingIOError):
            raise
        return None
    return lock
