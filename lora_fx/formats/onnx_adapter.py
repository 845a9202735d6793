"""Adapter files for one exported model, onnxruntime's own kind and that of safetensors.

The export room reads and writes them, this is the way there.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from lora_fx.adapters.adapter import Adapter
from lora_fx.errors import AdapterError
from lora_fx.formats.hints import Hints
from lora_fx.io.adapter_files import is_ort_adapter, is_slot_tensors


def is_onnx_adapter(path: Path, names: Collection[str] = ()) -> bool:
    """Whether a file says that it is of an exported model, in either way."""
    return is_ort_adapter(path) or is_slot_tensors(path)


def read_onnx_adapter(path: Path, name: str, hints: Hints) -> Adapter:
    """Reads what `lora_fx.export_adapter` wrote; each scale is in its B, so it reads as 1."""
    from lora_fx.export.slots.adapter_file import read_adapter_file

    return read_adapter_file(path, name)


def write_onnx_adapter(adapter: Adapter, path: Path, hints: Hints, force: bool) -> None:
    """Writes an adapter for one swappable model, as `lora_fx.export_adapter` does."""
    if hints.model is None:
        raise AdapterError(
            f"{path}: an .onnx_adapter is made for one model; pass model=, the .onnx file that was "
            'exported with adapters="input"'
        )
    from lora_fx.export import export_adapter

    export_adapter(adapter, hints.model, path, format="onnx_adapter", force=force)
