"""What onnxruntime does not tell of an adapter file: how many values its table lists."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from lora_fx.errors import AdapterError

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
