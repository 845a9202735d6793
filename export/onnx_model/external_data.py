"""External data of a model about to be read: where it may lie, and how it must add up."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto, TensorProto, external_data_helper

from lora_fx.errors import ExportError, advised, shorten
from lora_fx.export.onnx_model.tensor_protos import byte_size, every_tensor
from lora_fx.io.plain_file import check_plain

_KEYS = {"location", "offset", "length", "checksum"}
_PLACE = re.compile("[0-9]{1,18}")  # ASCII, and no more than a file can have


@dataclass(frozen=True, order=True)
class Range:
    """Where the bytes of a tensor lie.

    Attributes:
        location: the file, from the directory of the model.
        offset: of the first byte.
        length: in bytes.
        tensor: its name.
    """

    location: str
    offset: int
    length: int
    tensor: str


@advised("copy the file and its data again, or export it again")
def check_external_data(model: ModelProto, path: Path) -> None:
    """Refuses a model whose external data is not plainly its own.

    onnxruntime takes hard links, and ranges that overlap or are shifted within the file: the
    weights are then silently wrong.

    Args:
        model: the model, loaded without its external data.
        path: where it lies; its data must lie beside it, or below.

    Raises:
        ExportError: names the tensor or file, what was found and what was expected.
    """
    ranges = sorted(range_of(tensor, path) for tensor in external_tensors(model))
    sizes = {location: _size(path, location) for location in {r.location for r in ranges}}
    end = Range("", 0, 0, "")
    for one in ranges:
        if one.offset + one.length > sizes[one.location]:
            raise ExportError(
                f"{path}: {one.tensor}: bytes {one.offset} to {one.offset + one.length} of "
                f"{one.location}, which has {sizes[one.location]}: the data file is truncated"
            )
        if one.location == end.location and one.offset < end.offset + end.length:
            raise ExportError(f"{path}: {one.tensor} and {end.tensor} overlap in {one.location}")
        end = one


def external_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """The tensors whose bytes lie beside the model, wherever in it they are."""
    return (t for t in every_tensor(model) if external_data_helper.uses_external_data(t))


def range_of(tensor: TensorProto, path: Path) -> Range:
    """Where the bytes of a tensor lie: from the first byte of the file on, and as many as it takes.

    TorchScript's exporter writes a file for each tensor of a large model, and says no more of it
    than its name.

    Raises:
        ExportError: it does not say so plainly.
    """
    where = f"{path}: {tensor.name}"
    keys = [entry.key for entry in tensor.external_data]
    odd = [key for key in keys if key not in _KEYS or keys.count(key) > 1]
    if odd or "location" not in keys:
        found = f"unknown or repeated: {shorten(odd) or 'none'}"
        lacking = "none" if "location" in keys else "location"
        raise ExportError(f"{where}: external data keys: {found}; missing: {lacking}")
    values = {"offset": "0", "length": str(byte_size(tensor))}
    values |= {entry.key: entry.value for entry in tensor.external_data}
    if not all(_PLACE.fullmatch(values[key]) for key in ("offset", "length")):
        raise ExportError(
            f"{where}: offset {values['offset']!r:.80}, length {values['length']!r:.80}, expected "
            "whole numbers of at most 18 digits: export it again"
        )
    offset, length = int(values["offset"]), int(values["length"])
    if length != byte_size(tensor):
        raise ExportError(
            f"{where}: {length} bytes of external data, its shape {list(tensor.dims)} takes "
            f"{byte_size(tensor)}"
        )
    return Range(values["location"].removeprefix("./"), offset, length, tensor.name)


def _size(path: Path, location: str) -> int:
    """Size of a data file: a plain file beside the model or below it, nothing else."""
    parts = location.split("/")
    if {"", ".", ".."}.intersection(parts) or set(location) & set("\\:\0"):
        raise ExportError(
            f"{path}: external data at {location!r}: expected the name of a file beside it or below"
        )
    file = path.parent / location
    try:
        status = file.lstat()
    except OSError as error:
        raise ExportError(f"{path}: its data file {location}: {error.strerror}") from error
    over = [Path(path.parent, *parts[:end]) for end in range(1, len(parts))]
    is_own = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
    if not is_own or any(directory.is_symlink() for directory in over):
        raise ExportError(
            f"{path}: its data file {location} is a link or no plain file: copy it, by cp -L from "
            "where a hub keeps its files"
        )
    return check_plain(file, ExportError)
