"""The values of an adapter for the slots of one model, in safetensors: any runtime can feed them.

Each tensor bears the name of its graph input. The metadata has one text, `KEY`, in JSON: the
``base`` digest and the ``model_version`` of the model's manifest, the ``slots``, by name, with
``dtype`` and ``shape``, null where the rank goes, and the name of the ``adapter``, or null.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from lora_fx.errors import AdapterError, shorten, within
from lora_fx.export.slots.manifest import Manifest
from lora_fx.io.adapter_files import KEY
from lora_fx.io.safetensors_file import read_metadata, read_tensors
from lora_fx.io.strict_json import parse_object

Values = Mapping[str, torch.Tensor]
VERSION = 1
_FIELDS = {"base": str, "model_version": int, "slots": dict}


def write_slot_tensors(
    path: Path, values: Values, manifest: Manifest, adapter: str | None = None
) -> None:
    """Writes a value for each input of each slot.

    Args:
        path: the file.
        values: by the names of the inputs.
        manifest: of the model.
        adapter: its name; None for no adapter.
    """
    slots = {
        given.name: {"dtype": slot.dtype, "shape": list(given.shape)}
        for slot in manifest.slots
        for given in slot.inputs.values()
    }
    said = {
        "version": VERSION,
        "adapter": adapter,
        "base": manifest.base,
        "model_version": manifest.model_version,
        "slots": slots,
    }
    # Copies: of tensors that share memory, safetensors writes none.
    copies = {
        name: value.clone(memory_format=torch.contiguous_format) for name, value in values.items()
    }
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    path.write_bytes(save(copies, metadata={KEY: text}))


def read_slot_tensors(path: Path) -> tuple[dict[str, torch.Tensor], str, int]:
    """The values, the digest of the base that they are for, and the version of the model.

    Raises:
        AdapterError: it is damaged, or holds other tensors than it says.
    """
    values = read_tensors(path)
    with within(path), within(KEY):
        said: dict[str, Any] = parse_object(read_metadata(path).get(KEY, "").encode())
        if said.get("version") != VERSION:
            found = said.get("version")
            raise AdapterError(f"version {found!r:.40}, expected {VERSION}: make it again")
        for name, kind in _FIELDS.items():
            if type(said.get(name)) is not kind:
                raise AdapterError(f"{name} is {said.get(name)!r:.80}: make it again")
        slots = said["slots"]
        if other := sorted(values.keys() ^ slots.keys()):
            raise AdapterError(f"the tensors and the list of slots differ in {shorten(other)}")
        for name, value in values.items():
            _check_entry(name, value, slots[name])
    return values, said["base"], said["model_version"]


def _check_entry(name: str, value: torch.Tensor, entry: Any) -> None:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    listed = shape if isinstance(shape, list) and len(shape) == value.ndim else [0] * value.ndim
    pairs = zip(value.shape, listed, strict=True)
    found = {"dtype": _dtype(value), "shape": [said and size for size, said in pairs]}
    if found != entry:
        raise AdapterError(
            f"{name} is {_dtype(value)} {list(value.shape)}, and listed as {entry!r:.80}"
        )


def _dtype(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
