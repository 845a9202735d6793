"""From an adapter to the file that onnxruntime loads beside a swappable model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch.utils.dlpack import from_dlpack

import lora_fx
from lora_fx.adapter import Adapter, Update
from lora_fx.errors import AdapterError, ExportError, shorten
from lora_fx.export.adapter_check import check_adapter_file, read_adapter
from lora_fx.export.manifest import Manifest, Slot, digest_of
from lora_fx.export.model_file import load_proto, manifest_in
from lora_fx.export.publish import staged
from lora_fx.export.runtime import ERRORS

Array = np.ndarray[Any, Any]
_ADAPTER_VERSION = 1


def export_adapter(
    adapter: Adapter | str | Path,
    model_path: str | Path,
    out_path: str | Path,
    *,
    force: bool = False,
) -> None:
    """Writes an adapter as a file for a model that was exported with ``adapters="input"``.

    A layer that the adapter leaves alone gets a value of rank 0. The scale is folded into B in
    float32 or wider, then both are rounded once to the type of the slot.

    Args:
        adapter: an adapter, or a path for `lora_fx.load_adapter`.
        model_path: the model; its weights are not read.
        out_path: the ``.onnx_adapter`` file.
        force: replace a file that exists.

    Raises:
        ExportError: the model has no slots, or the output exists.
        AdapterError: the adapter does not fit the slots, or holds what a slot cannot carry.
    """
    source = (
        [Path(model_path)] if isinstance(adapter, Adapter) else [Path(adapter), Path(model_path)]
    )
    out = Path(out_path)
    if out.resolve() in [path.resolve() for path in source]:
        raise ExportError(f"{out}: is an input of this call: give another name")
    manifest = manifest_in(load_proto(Path(model_path)), Path(model_path))
    if manifest is None:
        raise ExportError(f'{model_path}: takes no adapter: export it with adapters="input"')
    if not isinstance(adapter, Adapter):
        adapter = lora_fx.load_adapter(adapter)
    _check_fits(adapter, manifest, Path(model_path))
    arrays: dict[str, Array] = {}
    for slot in manifest.slots:
        down, up = _factors(adapter, adapter.updates.get(slot.path), slot)
        arrays[slot.down], arrays[slot.up] = _to_numpy(down), _to_numpy(up)
    with staged(out, force=force) as draft:
        _write(draft, arrays, manifest)
        check_adapter_file(draft, manifest, Path(model_path))
        _check_bits(draft, arrays)


def _check_fits(adapter: Adapter, manifest: Manifest, model: Path) -> None:
    slots = {slot.path: slot for slot in manifest.slots}
    who = f"adapter {adapter.name!r} for {model}"
    weights = {f"{slot.path}.weight": slot.digest for slot in manifest.slots}
    # PEFT stores an adapted embedding's or head's own weight too: what is unchanged is no matter.
    changed = [n for n, t in adapter.replacements.items() if weights.get(n) != digest_of(t)]
    if changed:
        names = shorten(changed)
        raise AdapterError(f"{who}: replaces {names}: a slot cannot; fold it into its own model")
    biased = [path for path, update in adapter.updates.items() if update.bias is not None]
    if biased:
        names = shorten(biased)
        raise AdapterError(f"{who}: lora_bias at {names}: a slot cannot carry it; fold it instead")
    unmatched = [path for path in adapter.updates if path not in slots]
    if unmatched:
        raise AdapterError(
            f"{who}: no slot at {shorten(unmatched)}; the model has slots at {shorten(list(slots))}"
        )
    for path, update in adapter.updates.items():
        expected = (slots[path].out_features, slots[path].in_features)
        if update.shape != expected:
            raise AdapterError(
                f"{who}: {path}: the update is (out, in) {update.shape}, the layer is {expected}"
            )


def _factors(
    adapter: Adapter, update: Update | None, slot: Slot
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (in, r) and B (r, out), the scale folded into B."""
    dtype = getattr(torch, slot.dtype)
    if update is None:
        empty = torch.zeros(slot.in_features, 0), torch.zeros(0, slot.out_features)
        return empty[0].to(dtype), empty[1].to(dtype)
    down, up, _ = update.factors(dtype)
    if not (math.isfinite(update.scale) and down.isfinite().all() and up.isfinite().all()):
        raise AdapterError(
            f"adapter {adapter.name!r}: {slot.path}: values that are not finite, or that overflow "
            f"{slot.dtype} with the scale {update.scale:g}"
        )
    return down.T.contiguous(), up.T.contiguous()


def _to_numpy(tensor: torch.Tensor) -> Array:
    tensor = tensor.detach().cpu()
    return tensor.view(torch.uint16).numpy() if tensor.dtype is torch.bfloat16 else tensor.numpy()


def _write(draft: Path, arrays: dict[str, Array], manifest: Manifest) -> None:
    types = {n: slot.dtype for slot in manifest.slots for n in (slot.down, slot.up)}
    values = {name: _to_ort(array, types[name]) for name, array in arrays.items()}
    file = ort.AdapterFormat()
    file.set_adapter_version(_ADAPTER_VERSION)
    file.set_model_version(manifest.model_version)
    file.set_parameters(values)
    try:
        # Reads the memory of `arrays` through `values`: both must live until it returns.
        file.export_adapter(str(draft))
    except (*ERRORS, RuntimeError) as error:
        raise ExportError(f"{draft.name}: not written by onnxruntime: {error}") from error


def _to_ort(array: Array, dtype: str) -> ort.OrtValue:
    if dtype == "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, onnx.TensorProto.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


def _check_bits(draft: Path, arrays: dict[str, Array]) -> None:
    stored = read_adapter(draft).get_parameters()
    for name, array in arrays.items():
        found = _to_numpy(from_dlpack(stored[name]))  # numpy() refuses bfloat16
        if found.shape != array.shape or found.tobytes() != array.tobytes():
            raise ExportError(f"{draft.name}: {name}: read back other values than were written")
