"""JSON as it was meant: no duplicate keys, no NaN, no byte order mark, bounded size.

And, of files that other tools read as Python does, whatever Python makes of it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from lora_fx.errors import AdapterError, LoraFxError, within
from lora_fx.io.plain_file import read_plain

MAX_BYTES = 1 << 20
MAX_JSON = 64 << 20  # the index of a large model's weights has megabytes
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # of a character outside of the first 65,536


def read_object(path: Path) -> dict[str, object]:
    """Reads a file that holds one JSON object of at most 1 MB.

    Raises:
        AdapterError: the file cannot be read, is larger, or is not strictly a JSON object.
    """
    data = read_plain(path, MAX_BYTES)
    with within(path):
        return parse_object(data)


def read_json(path: Path, error: type[LoraFxError] = LoraFxError) -> Any:
    """What a JSON file of somebody else's directory holds, a config of a model or a tokenizer.

    Raises:
        LoraFxError: it cannot be read; of the kind that is given.
    """
    try:
        return json.loads(read_plain(path, MAX_JSON, error))
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: cannot be read: {problem}: download or save it again") from problem


def parse_object(data: bytes) -> dict[str, object]:
    """Parses bytes as one JSON object.

    Args:
        data: UTF-8 text.

    Raises:
        AdapterError: not UTF-8, not JSON, a duplicate key, NaN or Infinity, half a character, or
            not an object.
    """
    if not data.strip():
        raise AdapterError("empty, expected a JSON object")
    if data.startswith(b"\xef\xbb\xbf"):
        raise AdapterError("starts with a byte order mark; save it as plain UTF-8")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
        )
    except UnicodeDecodeError as error:
        raise AdapterError(f"not UTF-8 text: {error}") from error
    except RecursionError as error:
        raise AdapterError("nested too deeply") from error
    except ValueError as error:  # also a number of too many digits
        raise AdapterError(f"not strict JSON: {error}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"holds a {type(value).__name__}, expected a JSON object")
    if _HALF.search(data):
        _check_whole(value)
    return value


def to_json(values: Mapping[str, Any]) -> str:
    """Plain values as JSON to be read by people, too."""
    return json.dumps(values, indent=2, allow_nan=False)


def _check_whole(value: object) -> None:
    """Refuses half of a surrogate pair, which is a string for Python alone: no file can hold it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise AdapterError(f"{half!r} is half a character, which no UTF-8 text holds") from error


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) < len(pairs):
        [(duplicate, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {duplicate!r} appears twice")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
