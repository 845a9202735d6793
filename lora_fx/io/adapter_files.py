"""Files with an adapter's values for the slots of one exported model, told by how they begin."""

from __future__ import annotations

from pathlib import Path

from lora_fx.errors import AdapterError
from lora_fx.io.safetensors_file import MAX_HEADER

IDENTIFIER = b"TORT"  # of onnxruntime's own kind, behind four bytes
KEY = "lora_fx.adapter"  # of the metadata of ours, in safetensors


def is_ort_adapter(path: Path) -> bool:
    """Whether a file is onnxruntime's own kind.

    Raises:
        AdapterError: it cannot be read.
    """
    return path.is_file() and _start(path, 8)[4:] == IDENTIFIER


def is_slot_tensors(path: Path) -> bool:
    """Whether a file is of safetensors with the values of slots, whatever else is wrong with it.

    Raises:
        AdapterError: it cannot be read.
    """
    if not path.is_file():
        return False
    start = _start(path, 9)
    length = int.from_bytes(start[:8], "little")
    if start[8:] != b"{" or length > MAX_HEADER:
        return False
    return f'"{KEY}":'.encode() in _start(path, 8 + length)


def _start(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error.strerror}") from error
