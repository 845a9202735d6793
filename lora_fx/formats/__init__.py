"""Adapters on disk: one file a format, and here which is which."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from lora_fx.adapter import Adapter, check_name
from lora_fx.errors import AdapterError
from lora_fx.formats.hints import Hints
from lora_fx.formats.peft import read_peft
from lora_fx.formats.peft_write import write_peft


@dataclass(frozen=True)
class Format:
    """How one format is read and written, and which hints it takes beside ``strict``."""

    read: Callable[[Path, str, Hints], Adapter]
    write: Callable[[Adapter, Path, bool], None]
    hints: tuple[str, ...] = ()


FORMATS = {
    "peft": Format(read_peft, write_peft, ("allow_pickle",)),
}


def load_adapter(
    path: str | PathLike[str],
    *,
    name: str | None = None,
    format: str = "auto",
    base: object = None,
    strict: bool = True,
    **hints: Any,
) -> Adapter:
    """Reads an adapter from disk.

    Args:
        path: a directory written by PEFT.
        name: tells adapters apart in one graph; an identifier. Default: made from the path.
        format: ``"peft"``, or ``"auto"`` to detect it.
        base: the model or graph that lossy names are resolved against; PEFT's are not lossy.
        strict: refuse what is suspicious; False turns it into an ``AdapterWarning``.
        **hints: ``allow_pickle=True`` reads a ``.bin``, with ``weights_only=True``.

    Returns:
        The adapter; its tensors are memory-mapped, in the dtype of the file.

    Raises:
        AdapterError: names the file, the tensor or field, what was found and expected.
    """
    source = Path(path)
    if not source.exists():
        raise AdapterError(f"{source}: no such file or directory")
    chosen = _format(_detect(source) if format == "auto" else format)
    unknown = sorted(set(hints) - set(chosen.hints))
    if unknown:
        raise AdapterError(
            f"{source}: unknown hint {unknown[0]!r}; this format takes {', '.join(chosen.hints)}"
        )
    if name is not None:
        check_name(name)
    return chosen.read(
        source, name or _name_from(source), dataclasses.replace(Hints(strict=strict), **hints)
    )


def save_adapter(
    adapter: Adapter,
    path: str | PathLike[str],
    *,
    format: str = "peft",
    force: bool = False,
) -> None:
    """Writes an adapter to disk, completely or not at all.

    Args:
        adapter: what to write; each tensor keeps its dtype.
        path: what to create; it must not exist, except with ``force``.
        format: ``"peft"``.
        force: replace an adapter that is already there.

    Raises:
        AdapterError: the target exists, or the format cannot express the adapter.
    """
    _format(format).write(adapter, Path(path), force)


def _format(name: str) -> Format:
    if name not in FORMATS:
        supported = ", ".join(FORMATS)
        raise AdapterError(f"format {name!r} is not supported; supported: {supported}")
    return FORMATS[name]


def _detect(source: Path) -> str:
    """The format of an existing file or directory."""
    if source.is_dir():
        return "peft"
    supported = ", ".join(FORMATS)
    raise AdapterError(
        f"{source}: not a directory, expected a PEFT adapter's; supported formats: {supported}"
    )


def _name_from(source: Path) -> str:
    """A valid adapter name out of a file's name: ``my.adapter-v2`` becomes ``my_adapter_v2``."""
    word = re.sub(r"\W+", "_", source.resolve().name, flags=re.ASCII).strip("_")
    return word if word[:1].isalpha() else f"adapter_{word}".rstrip("_")
