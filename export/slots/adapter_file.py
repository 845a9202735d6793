"""From an adapter to the file that onnxruntime loads beside a swappable model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TypeGuard

import onnxruntime as ort
import torch

import lora_fx
from lora_fx.adapters.adapter import Adapter, AnyUpdate, Update, WeightUpdate
from lora_fx.adapters.other_updates import added_to_each
from lora_fx.adapters.source_record import is_embedding
from lora_fx.adapters.updates import activated
from lora_fx.choices import SlotFormat, takes, words
from lora_fx.errors import AdapterError, ExportError, shorten, within
from lora_fx.export.onnx_model.changed_file import check_digests
from lora_fx.export.onnx_model.model_file import load_proto, manifest_in
from lora_fx.export.onnx_model.tensors import to_numpy
from lora_fx.export.runtime.ort import ERRORS, to_ort_value, unreadable
from lora_fx.export.slots.adapter_report import AdapterReport, report_of
from lora_fx.export.slots.check_adapter import check_adapter_file, read_stored, values_of
from lora_fx.export.slots.every_value import every_value
from lora_fx.export.slots.manifest import NO_SLOTS, Manifest
from lora_fx.export.slots.slot_tensors import write_slot_tensors
from lora_fx.export.slots.slot_values import values_of_adapter
from lora_fx.injection.branch_tensors import BranchTensors, update_of
from lora_fx.io.atomic import refuse_existing, staged
from lora_fx.io.output_place import keeping
from lora_fx.io.safetensors_file import LISTED
from lora_fx.layers.axes import sizes_of
from lora_fx.layers.layer import Layer
from lora_fx.layers.layer_types import TYPES

ORT_ADAPTER, SAFETENSORS = ".onnx_adapter", ".safetensors"
_ADAPTER_VERSION = 1
_NO_ADAPTER = Adapter("none", {})


@takes(ExportError, unreadable)
def export_adapter(
    adapter: Adapter | str | Path | None,
    model_path: str | Path,
    out_path: str | Path,
    *,
    format: SlotFormat | None = None,
    force: bool = False,
    check: bool = True,
) -> AdapterReport:
    """Writes an adapter as a file for a model that was exported with slots.

    A layer that the adapter leaves alone gets a value of no effect. The scale is folded into B in
    float32 or wider, then both are rounded once to the type of the slot.

    Args:
        adapter: an adapter, or a path for `lora_fx.load_adapter`; None: no adapter, what leaves the
            base as it is, for a model that has to be fed (``adapters="required"``).
        model_path: the model.
        out_path: the file.
        format: ``"onnx_adapter"``, onnxruntime's own, which has nothing for a whole tensor that the
            adapter leaves alone; or ``"safetensors"``: each graph input of a slot by its name,
            none left out and none empty, and metadata that tell the model. By default safetensors
            where ``out_path`` ends so.
        force: replace a file that exists.
        check: read all weights of the model once, and refuse one that is not what was exported;
            if False, only those are read that DoRA and (IA)3 scale.

    Returns:
        A report of the slots that the adapter fills, with ranks, and of those that it leaves.

    Raises:
        ExportError: the model has no slots, was changed, or the output exists.
        AdapterError: the adapter does not fit the slots, or holds what a slot cannot carry.
    """
    source, out = (None if isinstance(adapter, Adapter) else adapter), Path(out_path)
    if format is None:
        format = "safetensors" if out.suffix == SAFETENSORS else "onnx_adapter"
    if format not in words(SlotFormat):
        known = " or ".join(words(SlotFormat))
        raise ExportError(f"a file of format {format!r:.80}: expected {known}")
    with keeping(source, model_path):
        refuse_existing(out, force=force)
        return _export(adapter, Path(model_path), out, format, force, check)


def _export(
    adapter: Adapter | str | Path | None,
    model_path: Path,
    out: Path,
    format: SlotFormat,
    force: bool,
    check: bool,
) -> AdapterReport:
    proto = load_proto(model_path)
    manifest = manifest_in(proto, model_path, strict=True)
    if manifest is None:
        raise ExportError(f"{model_path}: {NO_SLOTS}")
    if check:
        check_digests(proto, model_path)
    del proto
    if adapter is not None and not isinstance(adapter, Adapter):
        adapter = lora_fx.load_adapter(adapter)
    name = None if adapter is None else adapter.name
    own = _NO_ADAPTER if adapter is None else adapter
    values = values_of_adapter(own, manifest, model_path)
    del adapter, own  # a caller who gave a path has no use for it either
    with staged(out, force=force) as draft:
        told = partial(report_of, out, model_path, format, name, values=values, manifest=manifest)
        if format == "safetensors":
            values = every_value(manifest, model_path, values)
            write_slot_tensors(draft, values, manifest, name)
        else:
            write_ort_adapter(draft, values, manifest)
        check_adapter_file(draft, manifest, model_path)
        _check_bits(draft, values)
        return told(size=draft.stat().st_size)


def write_ort_adapter(draft: Path, values: Mapping[str, torch.Tensor], manifest: Manifest) -> None:
    """Writes onnxruntime's own file.

    Args:
        draft: the file.
        values: by the names of the slots' inputs; not empty.
        manifest: of the model.

    Raises:
        ExportError: onnxruntime does not write it.
    """
    given = {name: to_ort_value(value) for name, value in values.items()}
    file = ort.AdapterFormat()
    file.set_adapter_version(_ADAPTER_VERSION)
    file.set_model_version(manifest.model_version)
    file.set_parameters(given)
    try:
        # Reads the memory of `values` through `given`: both must live until it returns.
        file.export_adapter(str(draft))
    except (*ERRORS, RuntimeError) as error:
        raise ExportError(
            f"{draft}: not written by onnxruntime, as where a disk is full: give another "
            f"place, or make room there: {error}"
        ) from error


def _check_bits(draft: Path, values: Mapping[str, torch.Tensor]) -> None:
    stored = read_stored(draft)
    for name, value in values.items():
        found, array = to_numpy(stored.values[name]), to_numpy(value)
        if found.shape != array.shape or found.tobytes() != array.tobytes():
            raise ExportError(f"{draft.name}: {name}: read back other values than were written")


# What a file calls the tensors of a slot; vectors with the value that has no effect.
_EXPERTS = {"A_experts": "down", "B_experts": "up"}
_FACTORS = {"A": "down", "At": "down", "B": "up", "Bt": "up", **_EXPERTS}
_NEUTRAL = {"gain": 0.0, "bias": 0.0, "col": 1.0}


def read_adapter_file(path: Path, name: str) -> Adapter:
    """Reads a file that was made by `export_adapter`, of either format.

    A is stored as (in, r) and B as (r, out) with the scale folded in: they are turned around, and
    the scale is 1. ``lora_At`` is that of a transposed convolution, (in, r, *kernel), and
    ``lora_A_experts`` has one for each expert. A gain is read as the row that it was made of. A
    layer whose factors are empty, or zeros of rank 1, and whose vectors do nothing was left alone,
    and is left out. Any other value is a parameter that is replaced.

    Args:
        path: the file.
        name: of the adapter.

    Returns:
        The adapter; its tensors are copies, in the dtype of the file.

    Raises:
        AdapterError: it is missing, damaged, or holds what is no pair of A and B.
    """
    stored = read_stored(path)
    with within(path):
        # The file's memory is gone with the file.
        values = {key: value.clone() for key, value in values_of(stored).items()}
        given = [values.pop(key) for key in list(values) if key.endswith(LISTED)]
        tokens = tuple(int(token) for listed in given for token in listed)
        tensors = {key: value for key, value in values.items() if ".lora_" not in key}
        layers = _sorted({key: v for key, v in values.items() if key not in tensors})
        if not layers and not tensors:
            raise AdapterError("holds no values")
        updates = {module: _update(module, terms) for module, terms in layers.items()}
    acting = {
        module: activated(update, tokens) if _is_linear(update) else update
        for module, update in updates.items()
        if update
    }
    return Adapter(name, acting, tensors)


def _is_linear(update: AnyUpdate) -> TypeGuard[Update]:
    """Whether the tokens of an invocation mean an update."""
    is_matrix = isinstance(update, Update) and update.down.ndim == 2
    return is_matrix and not is_embedding(update.stored)


def _sorted(values: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors by layer and leaf."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    unused = []
    for key, value in values.items():
        module, _, leaf = key.rpartition(".lora_")
        axes = 2 if leaf in _FACTORS else 1
        if leaf not in (*_FACTORS, *_NEUTRAL) or not module or value.ndim < axes:
            unused.append(f"{key} {tuple(value.shape)}")
        else:
            layers.setdefault(module, {})[leaf] = value
    if unused:
        raise AdapterError(
            f"values that are no A (in, r) or B (r, out) of a layer: {shorten(unused)}; "
            "expected <path>.lora_A and <path>.lora_B, as export_adapter writes them"
        )
    roles = {m: sorted(_FACTORS[n] for n in own if n in _FACTORS) for m, own in layers.items()}
    halves = [module for module, found in roles.items() if found != ["down", "up"]]
    if halves:
        raise AdapterError(f"half of a pair, or none: {shorten(halves)}")
    return layers


def _update(module: str, values: dict[str, torch.Tensor]) -> AnyUpdate | None:
    """The update of one layer, or None if nothing is done to it."""
    found = {_FACTORS[leaf]: values[leaf] for leaf in _FACTORS if leaf in values}
    down, up = found["down"], found["up"]
    is_parameter = values.keys() == _EXPERTS.keys() and up.ndim == down.ndim in (2, 3)
    if is_parameter and (*up.shape[:-2], up.shape[-1]) == down.shape[:-1]:
        shape = *up.shape[:-1], down.shape[-1]
        return WeightUpdate("lora", added_to_each(up, down), shape) if up.any() else None
    known = (layer for layer in TYPES.values() if layer.kernel == down.ndim - 2)
    layer = next((t for t in known if {t.leaf("down"), t.leaf("up")} <= values.keys()), None)
    sizes = [layer and sizes_of(getattr(layer, role), found[role].shape) for role in found]
    if layer is None or not all(sizes) or len({own["r"] for own in sizes if own}) > 1:
        raise AdapterError(
            f"{module}: A {tuple(down.shape)} and B {tuple(up.shape)} are of two ranks"
        )
    shape = (up.shape[layer.axis("up", "out")], *layer.canonical("down", down).shape[1:])
    rank = down.shape[layer.axis("down", "r")]
    if rank == 1 and not (down.any() or up.any()):  # it stands for no rank
        rank = 0
    acting = {n: values[n] for n, v in _NEUTRAL.items() if n in values and (values[n] != v).any()}
    if not rank and not acting:
        return None
    own = Layer(path=module, kind=layer.name, shape=shape, dtype=down.dtype)
    return update_of(BranchTensors(**(found if rank else {}), **acting), own)
