"""Where an output may stand: at a path that can be, and away from what the call reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from lora_fx.errors import LoraFxError
from lora_fx.io.plain_file import check_path, kind_of

_SOURCES: ContextVar[tuple[Path, ...]] = ContextVar("_SOURCES", default=())


@contextmanager
def keeping(*sources: str | Path | None) -> Iterator[None]:
    """Lets no writer inside replace what a call reads, whatever it is told to replace.

    Args:
        sources: files and directories; what is none is passed over. Beside a model it is its
            weights, and of a directory what its links lead to.
    """
    own = tuple(real for source in sources if source for real in _files_of(Path(source)))
    token = _SOURCES.set((*_SOURCES.get(), *own))
    try:
        yield
    finally:
        _SOURCES.reset(token)


@contextmanager
def keeping_nothing() -> Iterator[None]:
    """Lets writers write where only they do: in a draft, wherever it lies."""
    token = _SOURCES.set(())
    try:
        yield
    finally:
        _SOURCES.reset(token)


def check_places(places: list[Path], error: type[LoraFxError]) -> None:
    """Refuses places that cannot be, or where an output would change an input.

    An output is no input, holds none, and lies in none: in the directory of an input nothing is
    written, but a new directory may be made. Other spellings, links and hard links count too.

    Raises:
        LoraFxError: of the type ``error``; names the place and the input.
    """
    for place in places:
        check_path(place, error)
        for source in _SOURCES.get():
            if relation := _relation(Path(os.path.realpath(place)), source):
                raise error(f"{place}: {relation}, which is left as it is: write to another place")


def refuse_special(places: list[Path], error: type[LoraFxError]) -> None:
    """Refuses outputs that are links, devices, FIFOs or sockets: what they stand for is not ours.

    Raises:
        LoraFxError: of the type ``error``.
    """
    for place in places:
        if place.is_symlink():
            what = f"a link to {os.readlink(place)}"
        elif place.is_file() or place.is_dir() or not place.exists():
            continue
        else:
            what = kind_of(place.stat().st_mode)
        raise error(
            f"{place}: is {what}, so it is no plain file or directory and not replaced: remove it, "
            "or give the path of a file itself"
        )


def _files_of(source: Path) -> Iterator[Path]:
    try:
        own = [source, source.with_name(f"{source.name}.data")] if source.name else [source]
        own += (
            [entry for entry in source.iterdir() if entry.is_symlink()] if source.is_dir() else []
        )
        yield from (Path(os.path.realpath(path)) for path in own if path.exists())
    except (OSError, ValueError):  # no file is called so, or none that can be read: its reader says
        return


def _relation(place: Path, source: Path) -> str | None:
    if _is_same(place, source):
        return "is an input of this call"
    if any(_is_same(place, above) for above in source.parents):
        return f"holds an input of this call, {source}"
    if place.parent.exists() and any(_is_same(above, source) for above in place.parents):
        return f"lies in an input of this call, {source}"
    return None


def _is_same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them is not there
        return False
