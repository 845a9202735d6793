"""Adapter files as they are read: onnxruntime itself checks almost nothing."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort
import torch
from torch.utils.dlpack import from_dlpack

from lora_fx.errors import AdapterError, advised, shorten, within
from lora_fx.export.runtime.ort import ERRORS
from lora_fx.export.slots.manifest import UNKNOWN, Manifest
from lora_fx.export.slots.slot import AnySlot, Slot
from lora_fx.export.slots.slot_tensors import read_slot_tensors
from lora_fx.injection.branch_tensors import BranchTensors, overflow
from lora_fx.io.adapter_files import IDENTIFIER, is_slot_tensors
from lora_fx.io.plain_file import check_plain
from lora_fx.io.safetensors_file import check_tensors

FORMAT_VERSION = 1
_MAX_FILE = (1 << 31) - 1  # flatbuffers' own limit
# ValueError: a name that is not UTF-8; the last two: numbers that torch has no type for.
DAMAGE = (*ERRORS, RuntimeError, ValueError, BufferError, TypeError)
Values = dict[str, torch.Tensor]
_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
    "float64": "tensor(double)",
    "int64": "tensor(int64)",
}


@dataclass(frozen=True)
class Stored:
    """An adapter file of either kind.

    Attributes:
        values: by the names of the slots' inputs: views of the file's memory, which it keeps.
        model_version: of the model that it was made for, as its manifest has it.
        base: the digest of that model's base, if the file says it.
        memory: what the values are views of.
    """

    values: Values
    model_version: int
    base: str = UNKNOWN
    memory: object = None


@advised("make it again with export_adapter")
def read_stored(path: Path) -> Stored:
    """Reads an adapter file, onnxruntime's own or of safetensors.

    Raises:
        AdapterError: it is missing, is no adapter file, or is damaged.
    """
    check_plain(path)
    if is_slot_tensors(path):
        values, base, version = read_slot_tensors(path)
        return Stored(values, version, base)
    stored = read_adapter(path)
    with within(path):
        return Stored(_views(stored), stored.get_model_version(), memory=stored)


@advised("make it again with export_adapter")
def check_adapter_file(path: Path, manifest: Manifest, model: Path) -> None:
    """Checks that a file was made for this model, and fills exactly its slots.

    Raises:
        AdapterError: it is no adapter file, is damaged, or belongs to another model.
    """
    stored = read_stored(path)
    with within(path):
        _check(stored, manifest, model)


def _check(stored: Stored, manifest: Manifest, model: Path) -> None:
    found, expected = stored.model_version, manifest.model_version
    same = found == expected and stored.base in (UNKNOWN, manifest.base)
    if not same and manifest.is_ours:  # else names and shapes are all that is known
        raise AdapterError(
            f"made for another model: model version {found}, {model} has {expected}; make "
            f"it again: export_adapter(adapter, {str(model)!r}, ...)"
        )
    known = {name: slot for slot in manifest.slots for name in slot.names}
    missing = [
        name for name, slot in known.items() if name not in stored.values and not slot.may_lack
    ]
    unknown = [name for name in stored.values if name not in known]
    if missing or unknown:
        raise AdapterError(
            f"does not fit {model}: slots without a value: {shorten(missing) or 'none'}; "
            f"values without a slot: {shorten(unknown) or 'none'}"
        )
    for slot in manifest.slots:
        _check_slot(slot, stored.values)
    values = values_of(stored)
    for slot in manifest.slots:
        if not isinstance(slot, Slot):
            continue
        given = {part: slot.from_input(part, values[n]) for part, (n, _) in slot.inputs.items()}
        terms = BranchTensors(**given)
        if what := overflow(slot.layer, terms):
            raise AdapterError(f"{slot.path}: {what} overflows {slot.dtype}; make it again")


def values_of(stored: Stored) -> Values:
    """The tensors of an adapter file, by name: views of its memory.

    Raises:
        AdapterError: one is not of floats, or holds NaN or infinity.
    """
    check_tensors(stored.values)  # numpy would refuse bfloat16
    return stored.values


def _views(stored: ort.AdapterFormat) -> Values:
    try:
        parameters = stored.get_parameters()
        return {name: from_dlpack(parameters[name]) for name in sorted(parameters)}
    except DAMAGE as error:
        raise AdapterError(f"damaged: {_first_line(error)}") from error


def _check_slot(slot: AnySlot, values: Values) -> None:
    ranks = set()
    for name, sizes in slot.inputs.values():
        if name not in values:
            continue
        found, dtype = tuple(values[name].shape), _dtype(values[name])
        fits = len(found) == len(sizes)
        if not fits or any(s not in (None, f) for s, f in zip(sizes, found, strict=True)):
            expected = tuple("r" if size is None else size for size in sizes)
            raise AdapterError(f"{name} is {found}, expected {expected}")
        if dtype != _TYPES[slot.dtype]:
            raise AdapterError(f"{name} holds {dtype}, expected {_TYPES[slot.dtype]}")
        ranks |= {size for size, want in zip(found, sizes, strict=True) if want is None}
    if len(ranks) > 1:
        raise AdapterError(f"{slot.path}: A and B are of ranks {sorted(ranks)}")


def _dtype(value: torch.Tensor) -> str:
    name = str(value.dtype).removeprefix("torch.")
    return _TYPES.get(name, name)


def read_adapter(path: Path) -> ort.AdapterFormat:
    """Reads an adapter file of onnxruntime's own kind.

    Raises:
        AdapterError: it is missing, is no adapter file, or is damaged.
    """
    check_plain(path, most=_MAX_FILE)
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error.strerror}") from error
    if start[4:8] != IDENTIFIER:
        raise AdapterError(
            f"{path}: not an adapter file: identifier {start[4:8]!r}, expected {IDENTIFIER!r}; "
            "make one with export_adapter"
        )
    try:
        stored = ort.AdapterFormat.read_adapter(str(path))
    except DAMAGE as error:
        raise AdapterError(f"{path}: damaged: {_first_line(error)}") from error
    with within(path):
        _refuse_twice(path, stored)
    if stored.get_format_version() != FORMAT_VERSION:
        found = stored.get_format_version()
        raise AdapterError(f"{path}: format version {found}, expected {FORMAT_VERSION}")
    return stored


def _refuse_twice(path: Path, stored: ort.AdapterFormat) -> None:
    """Refuses two values of one name: onnxruntime keeps one of them, without a word."""
    listed, found = count_of(path), len(_views(stored))
    if listed != found:
        raise AdapterError(
            f"{listed} values of {found} names, expected a name for each: a name stands twice; "
            "make it again with export_adapter"
        )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


_PARAMETERS = 3  # the fourth field of the table, as onnxruntime's adapter_schema.fbs has it
_COUNT = struct.Struct("<I")
_BACK = struct.Struct("<i")
_FIELD = struct.Struct("<H")


def count_of(path: Path) -> int:
    """The length of the list of parameters of a file (flatbuffers, little endian).

    Raises:
        AdapterError: a place in it lies outside.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            table = _read(data, _COUNT, 0)
            fields = table - _read(data, _BACK, table)
            if _read(data, _FIELD, fields) < 4 + 2 * (_PARAMETERS + 1):
                return 0
            offset = _read(data, _FIELD, fields + 4 + 2 * _PARAMETERS)
            place = table + offset
            return _read(data, _COUNT, place + _read(data, _COUNT, place)) if offset else 0
    except (OSError, ValueError, struct.error) as error:
        raise AdapterError(f"damaged: its table cannot be read: {error}") from error


def _read(data: mmap.mmap, kind: struct.Struct, position: int) -> int:
    if position < 0:
        raise ValueError(f"a place before the file: {position}")
    return int(kind.unpack_from(data, position)[0])
