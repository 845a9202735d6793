"""Walks a model file's protobuf before it is parsed: what is no message takes no memory."""

from __future__ import annotations

import mmap
from pathlib import Path

from lora_fx.errors import ExportError

_MOST_FIELDS = 1_000_000
_MOST_BYTES = 10  # of a number
_GRAPH = 7  # the field of a model that holds its graph
_FIXED = {1: 8, 5: 4}
_NUMBER, _CONTENT = 0, 2


def check_outline(path: Path, size: int) -> None:
    """Refuses a file that is not fields from its start to its end, nor its graph.

    Protobuf would read all of it, and as much again, before it meets what is wrong.

    Args:
        path: a plain file.
        size: of it, in bytes.

    Raises:
        ExportError: says where the first thing lies that is no field.
    """
    if not size:
        return  # cannot be mapped
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for start, end in _fields(data, 0, len(data), _GRAPH):
            _fields(data, start, end, None)


def _fields(data: mmap.mmap, start: int, end: int, wanted: int | None) -> list[tuple[int, int]]:
    """Walks over fields, and gives where the content of those of one number lies."""
    found: list[tuple[int, int]] = []
    position = start
    for _ in range(_MOST_FIELDS):
        if position >= end:
            return found
        begin = position
        tag, position = _number(data, position, end)
        field, kind = tag >> 3, tag & 7
        if not field or kind not in (_NUMBER, _CONTENT, *_FIXED):
            raise _no_field(begin)
        length = _FIXED.get(kind, 0)
        if kind in (_NUMBER, _CONTENT):
            value, position = _number(data, position, end)
            length = value if kind == _CONTENT else 0
        if position + length > end:
            raise _no_field(begin)
        if field == wanted and kind == _CONTENT:
            found.append((position, position + length))
        position += length
    raise ExportError(f"not an ONNX file: more than {_MOST_FIELDS} fields, expected fewer")


def _number(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    value = 0
    for place in range(position, min(end, position + _MOST_BYTES)):
        value |= (data[place] & 0x7F) << 7 * (place - position)
        if data[place] < 0x80:
            return value, place + 1
    raise _no_field(position)


def _no_field(position: int) -> ExportError:
    return ExportError(
        f"not an ONNX file: byte {position} begins no field that ends within it, expected a whole "
        "model: it is cut, or has more behind it; copy or export it again"
    )
