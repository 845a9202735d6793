"""Files appear at their place whole and checked, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_fx.errors import ExportError


@contextmanager
def staged(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Gives a path to write to, and moves what was written there to ``target``.

    The file and its neighbours (external data) are written in a directory beside the target, on
    the same filesystem. If the body raises, that directory goes and nothing else has changed.
    Neighbours move first, the target last: a reader never meets a model without its data.

    Raises:
        ExportError: the target exists and ``force`` is False, or it cannot be written.
    """
    refuse_existing(target, force=force)
    try:
        directory = Path(tempfile.mkdtemp(prefix=f".{target.stem}-", dir=target.parent))
    except OSError as error:
        raise ExportError(f"{target}: cannot write to its directory: {error.strerror}") from error
    try:
        yield directory / target.name
        _publish(directory, target, force=force)
    except OSError as error:
        raise ExportError(f"{target}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def refuse_existing(target: Path, *, force: bool) -> None:
    """Refuses a target that cannot be published to, before any work is done.

    Raises:
        ExportError: the target or its external data exists, or its directory does not.
    """
    if not target.parent.is_dir():
        raise ExportError(f"{target}: its directory does not exist: create it first")
    if target.is_dir():
        raise ExportError(f"{target}: is a directory: give the name of a file in it")
    if force:
        return
    for path in (target, data_path(target)):
        if os.path.lexists(path):
            raise ExportError(f"{path}: exists: pass force=True to replace it")


def data_path(target: Path) -> Path:
    """Where the external data of a model lies: ``model.onnx`` -> ``model.onnx.data``."""
    return target.with_name(f"{target.name}.data")


def _publish(directory: Path, target: Path, *, force: bool) -> None:
    refuse_existing(target, force=force)  # it may have appeared meanwhile
    written = sorted(directory.iterdir(), key=lambda path: path.name == target.name)
    for path in written:
        os.replace(path, target.with_name(path.name))
    stale = data_path(target)
    if target.suffix == ".onnx" and stale.name not in {path.name for path in written}:
        stale.unlink(missing_ok=True)  # of the model that was just replaced
