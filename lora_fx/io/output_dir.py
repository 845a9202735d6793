"""A directory that gets all files of a command, or none."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lora_fx.errors import ExportError, shorten


def refuse_existing(out: Path, names: Sequence[str], force: bool) -> None:
    """Refuses a directory that holds one of the files to write.

    Raises:
        ExportError: it does, and ``force`` does not say to replace them, or it is no directory.
    """
    if os.path.lexists(out) and not out.is_dir():
        raise ExportError(f"{out}: is a file: give a directory")
    found = [name for name in names if os.path.lexists(out / name)]
    if found and not force:
        raise ExportError(f"{out}: holds {shorten(found)} already: pass --force to replace it")


@contextmanager
def staged(out: Path, names: Sequence[str], last: str, force: bool) -> Iterator[Path]:
    """A directory to write in, whose files move to ``out`` if the body did not raise.

    Args:
        out: gets the files.
        names: of the files.
        last: the file that is moved after all others: who sees it, sees them.
        force: replace files that exist.

    Raises:
        ExportError: ``out`` cannot be written, or holds one of the files.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise ExportError(f"{out}: cannot be created: {error.strerror}") from error
    try:
        yield draft
        refuse_existing(out, names, force)  # they may have appeared meanwhile
        out.mkdir(exist_ok=True)
        for file in sorted(draft.iterdir(), key=lambda file: file.name == last):
            os.replace(file, out / file.name)
    except OSError as error:
        raise ExportError(f"{out}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
