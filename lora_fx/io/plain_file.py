"""Files before they are read: at a path that can be, plain, of a bounded size, without holes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from lora_fx.errors import AdapterError, LoraFxError, shorten

# Below, holes cost nothing to read. Above, weights are stored to an eighth at the very least, also
# where a filesystem keeps zeros as holes.
_SMALL = 64 << 20
_LEAST_STORED = 8
# What git-lfs leaves in a clone where it was not asked for the file itself, in less than so much.
_POINTER, _POINTER_SIZE = b"version https://git-lfs.", 1024


def check_path(path: Path, error: type[LoraFxError]) -> Path:
    """Refuses a path that no file can have: with a NUL in it, a part that is too long, a loop.

    Nor can one that is not UTF-8: neither onnx nor onnxruntime takes it.

    Raises:
        LoraFxError: of the type ``error``; a file that is merely not there is not refused.
    """
    try:
        str(path).encode()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise error(
            f"{str(path)!r:.120}: cannot be the path of a file: {reason}: give another"
        ) from problem
    return path


def check_plain(
    path: Path, error: type[LoraFxError] = AdapterError, most: int | None = None
) -> int:
    """Refuses what cannot be read in bounded time and memory, and pointers to what can.

    Every reader asks here first: a FIFO never ends, a device may not either, and holes make a file
    of a few bytes larger than any memory.

    Args:
        path: of the file; a link counts as what it leads to.
        error: what is raised.
        most: bytes that the format may take.

    Returns:
        The size in bytes.

    Raises:
        LoraFxError: of the type ``error``; names the file, what it is, and what was expected.
    """
    try:
        str(path).encode()
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            models = shorten([str(file) for file in models_in(path)])
            known = f": give one of its own, {models}" if models else ""
            raise error(f"{path}: cannot be read: Is a directory, expected a file{known}")
        if not stat.S_ISREG(status.st_mode):
            raise error(
                f"{path}: cannot be read: {kind_of(status.st_mode)}, expected a plain file: copy "
                "its content to one"
            )
        if most is not None and status.st_size > most:
            raise error(f"{path}: {status.st_size} bytes, expected at most {most}")
        if status.st_size > _SMALL and not _is_stored(path, status.st_size):
            raise error(
                f"{path}: {status.st_size} bytes, of which nearly all are holes, expected stored "
                "ones: it was not written to the end; download or copy it again"
            )
        if status.st_size < _POINTER_SIZE and _start(path, len(_POINTER)) == _POINTER:
            raise error(
                f"{path}: a git-lfs pointer, which stands for the file: download that, with "
                "git lfs pull or from where the repository is"
            )
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from problem
    except ValueError as problem:  # a NUL in the name, or not UTF-8
        raise error(f"{str(path)!r}: cannot be read: {problem}: rename it") from problem
    return status.st_size


def models_in(directory: Path) -> list[Path]:
    """The ONNX files of a directory: its own, or those one level below, as of a pipeline."""
    return sorted([*directory.glob("*.onnx")] or directory.glob("*/*.onnx"))


def read_plain(path: Path, most: int, error: type[LoraFxError] = AdapterError) -> bytes:
    """The bytes of a plain file, at most so many.

    Raises:
        LoraFxError: of the type ``error``: it is no plain file, is larger, or cannot be read.
    """
    check_plain(path, error, most)
    try:
        data = _start(path, most + 1)
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from problem
    if len(data) > most:
        raise error(f"{path}: grew while it was read, expected at most {most} bytes")
    return data


def _start(path: Path, size: int) -> bytes:
    """The first bytes of a plain file, without waiting: it may have become a FIFO by now."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        return file.read(size)


def kind_of(mode: int) -> str:
    """What a file is that is no plain one."""
    kinds = {
        "a FIFO": stat.S_ISFIFO,
        "a device": stat.S_ISCHR,
        "a disk": stat.S_ISBLK,
        "a socket": stat.S_ISSOCK,
    }
    return next((name for name, is_kind in kinds.items() if is_kind(mode)), "no file")


def _is_stored(path: Path, size: int) -> bool:
    """Whether enough of a file is on the disk; also where no holes can be asked for."""
    if not hasattr(os, "SEEK_DATA"):
        return True
    stored = end = 0
    with path.open("rb") as file:
        while stored * _LEAST_STORED < size:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:  # no more data behind the last hole
                return False
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            stored += end - start
    return True
