"""A file, several files or a directory: at their place whole and checked, or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

from lora_fx.errors import AdapterError, ExportError, LoraFxError, memory_told, shorten
from lora_fx.io.draft import NEW, hidden_directory, put_in, sweep
from lora_fx.io.output_place import check_places, keeping_nothing, refuse_special

# What a forced write of an adapter may delete; anything else in its directory is somebody's work.
REPLACEABLE = {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "README.md"}

_ELSEWHERE = "remove it, or give another place"
# Where that is, Python finds out by writing there, which a full disk refuses too.
_TEMPORARY = "where temporary files go (TMPDIR)"
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def atomic(
    target: Path,
    into: Path,
    last: str,
    may_write: Callable[[], None],
    error: type[LoraFxError],
    gone: Path | None = None,
) -> Iterator[Path]:
    """Gives a directory to write in, and moves what was written there to where it belongs.

    The draft is on the filesystem of its place. Whatever is raised, an interrupt too, the draft
    goes, what had moved goes back, and what was there before is there again. What is left of a
    process that was killed goes before the next writes there.

    Args:
        target: what messages name.
        into: the directory that gets the files; made, with its parents, if there is none.
        last: the file that moves after all others: who sees it, sees them.
        may_write: refuses a target that is there; asked again at the end, when one may have come.
        error: what is raised if something cannot be written.
        gone: a file of what is replaced, which goes if none of its name was written.
    """
    may_write()
    into = Path(os.path.realpath(into))
    home = next(path for path in (into, *into.parents) if os.path.lexists(path))
    if not home.is_dir():
        raise error(f"{target}: cannot be created: {home} is no directory: give another place")
    for place in {home, into.parent}:
        sweep(place)
    try:
        with memory_told(target, error), hidden_directory(home) as hidden:
            draft = hidden / NEW / into.relative_to(home)
            draft.mkdir(parents=True)  # not the hidden one itself, which only its owner may read
            try:
                with keeping_nothing():
                    yield draft
            except LoraFxError as problem:  # of a place that will be gone
                problem.args = (str(problem).replace(str(draft), str(into)),)
                raise
            may_write()
            _put(hidden, draft, into, last, gone)
    except OSError as problem:
        there = f", or make room there and {_TEMPORARY}" if problem.errno in _FULL else ""
        raise error(
            f"{target}: cannot be written: {problem.strerror or problem}: give another place{there}"
        ) from problem


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory for what is made on the way, where temporary files go; gone afterwards.

    Raises:
        ExportError: there can be none, or its disk is full.
    """
    directory = None
    try:
        with tempfile.TemporaryDirectory() as directory:
            yield Path(directory)
    except OSError as problem:
        if directory is not None and problem.errno not in _FULL:
            raise
        raise ExportError(
            f"temporary files cannot be written: {problem.strerror or problem}: make room "
            f"{_TEMPORARY}, or let TMPDIR name another directory"
        ) from problem


def _put(hidden: Path, draft: Path, into: Path, last: str, gone: Path | None) -> None:
    """Moves each file, or at once the directories that are missing."""
    if into.exists():
        names = sorted((path.name for path in draft.iterdir()), key=lambda name: name == last)
        is_left = gone is not None and gone.name not in names and gone.exists()
        put_in(hidden, names, [gone.name] if gone is not None and is_left else [])
        return
    while not into.parent.exists():
        draft, into = draft.parent, into.parent
    os.replace(draft, into)


def publish(target: Path, content: bytes | Mapping[str, bytes], force: bool) -> None:
    """Writes an adapter's file, or its directory: file name -> content.

    Raises:
        AdapterError: the target exists, and is none of an adapter's or ``force`` does not say to
            replace it; or it cannot be written.
    """
    check = partial(_refuse_other, target, isinstance(content, Mapping), force)
    with atomic(target, target.parent, target.name, check, AdapterError) as draft:
        made = draft / target.name
        if isinstance(content, bytes):
            made.write_bytes(content)
            return
        made.mkdir()
        for name, each in content.items():
            (made / name).write_bytes(each)


def _refuse_other(target: Path, is_directory: bool, force: bool) -> None:
    check_places([target], AdapterError)
    if not os.path.lexists(target):
        return
    if not force:
        raise AdapterError(f"{target}: exists already; choose another path, or pass force=True")
    kind, is_kind = ("directory", target.is_dir()) if is_directory else ("file", target.is_file())
    if target.is_symlink() or not is_kind:
        raise AdapterError(f"{target}: is no plain {kind}, so it is not replaced: {_ELSEWHERE}")
    held = [entry.name for entry in target.iterdir()] if is_directory else []
    if others := sorted(set(held) - REPLACEABLE):
        raise AdapterError(
            f"{target}: holds more than an adapter, so it is not replaced: {others}: {_ELSEWHERE}"
        )


@contextmanager
def staged(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Gives a path to write a model to, with its external data beside it.

    Raises:
        ExportError: the target exists and ``force`` is False, or it cannot be written.
    """
    check = partial(refuse_existing, target, force=force)
    gone = data_path(target) if target.suffix == ".onnx" else None
    with atomic(target, target.parent, target.name, check, ExportError, gone) as draft:
        yield draft / target.name


def refuse_existing(target: Path, *, force: bool) -> None:
    """Refuses a model's file that cannot be written, before any work is done.

    Raises:
        ExportError: the target or its external data exists, or its directory does not.
    """
    places = [target, data_path(target)] if target.name else [target]
    check_places(places, ExportError)
    if not target.parent.is_dir():
        raise ExportError(f"{target}: its directory does not exist: create it first")
    if target.is_dir():
        raise ExportError(f"{target}: is a directory: give the name of a file in it")
    found = [path for path in places if os.path.lexists(path)]
    if found and not force:
        raise ExportError(f"{found[0]}: exists: pass force=True to replace it")
    refuse_special(found, ExportError)


def data_path(target: Path) -> Path:
    """Where the external data of a model lies: ``model.onnx`` -> ``model.onnx.data``."""
    return target.with_name(f"{target.name}.data")


def staged_files(
    out: Path, names: Sequence[str], last: str, force: bool
) -> AbstractContextManager[Path]:
    """A directory to write files of some names in, which move to ``out``, the last one last.

    Raises:
        ExportError: ``out`` cannot be written, or holds one of the files and ``force`` is False.
    """
    return atomic(out, out, last, partial(refuse_files, out, names, force), ExportError)


def refuse_files(out: Path, names: Sequence[str], force: bool) -> None:
    """Refuses a directory that holds one of the files to write.

    Raises:
        ExportError: it does, and ``force`` does not say to replace them, or it is no directory.
    """
    places = [out / name for name in names]
    check_places(places, ExportError)
    refuse_special([out], ExportError)
    if os.path.lexists(out) and not out.is_dir():
        raise ExportError(f"{out}: is a file: give a directory")
    found = [path for path in places if os.path.lexists(path)]
    if found and not force:
        held = shorten([path.name for path in found])
        raise ExportError(f"{out}: holds {held} already: pass --force to replace it")
    refuse_special(found, ExportError)
