"""Files with an adapter's values for the slots of one exported model, told by how they begin."""

from __future__ import annotations

from pathlib import Path

from lora_fx.errors import within
from lora_fx.io.safetensors_file import header_size, start_of

IDENTIFIER = b"TORT"  # of onnxruntime's own kind, behind four bytes
KEY = "lora_fx.adapter"  # of the metadata of ours, in safetensors


def is_ort_adapter(path: Path) -> bool:
    """Whether a file is onnxruntime's own kind.

    Raises:
        AdapterError: it cannot be read.
    """
    with within(path):
        return path.is_file() and start_of(path, 8)[4:] == IDENTIFIER


def is_slot_tensors(path: Path) -> bool:
    """Whether a file is of safetensors with the values of slots, whatever else is wrong with it.

    Raises:
        AdapterError: it cannot be read.
    """
    with within(path):
        length = header_size(path) if path.is_file() else None
        return length is not None and f'"{KEY}":'.encode() in start_of(path, 8 + length)
