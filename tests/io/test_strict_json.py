"""JSON files that must be refused, each by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_fx.errors import AdapterError, ExportError, LoraFxError
from lora_fx.io.strict_json import MAX_BYTES, parse_object, read_json, read_object


def test_an_object_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"r": 2, "inner": {"r": 3}, "name": "\\u00e9"}')
    assert read_object(file) == {"r": 2, "inner": {"r": 3}, "name": "é"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"[1]", "holds a list, expected a JSON object"),
        (b"3", "holds a int"),
        (b'\xef\xbb\xbf{"r": 2}', "byte order mark"),
        (b'{"r": 2, "r": 3}', "the key 'r' appears twice"),
        (b'{"a": {"r": 2, "x": 0, "r": 2}}', "the key 'r' appears twice"),
        (b'{"lora_alpha": NaN}', "NaN is not a JSON number"),
        (b'{"lora_alpha": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"r": 2', "not strict JSON"),
        (b'{"r": 2} x', "not strict JSON"),
        (b'{"r": "\xff"}', "not UTF-8"),
        (b'{"r": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"r": ' + b"9" * 5000 + b"}", "not strict JSON"),
        (b'{"a": ["x\\ud800"]}', "half a character"),
        (b'{"\\uDC00": 1}', "half a character"),
    ],
)
def test_what_is_no_strict_object_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        parse_object(data)


def test_a_large_file_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with file.open("wb") as stream:
        stream.truncate(MAX_BYTES + 1)
    with pytest.raises(AdapterError, match=r"config\.json: 1048577 bytes, expected at most"):
        read_object(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"config\.json: cannot be read: No such file"):
        read_object(tmp_path / "config.json")


def test_what_other_tools_read_is_read_as_they_do(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('[1, NaN, {"a": 1, "a": 2}]')
    assert read_json(file)[2] == {"a": 2}
    for text in ("", "{", "[" * 100_000):
        file.write_text(text)
        with pytest.raises(ExportError, match=r"config\.json: cannot be read"):
            read_json(file, ExportError)
    with pytest.raises(LoraFxError, match=r"nowhere: cannot be read"):
        read_json(tmp_path / "nowhere")


def test_a_whole_character_beyond_the_first_plane_is_read() -> None:
    """The control."""
    assert parse_object(b'{"a": "\\ud83d\\ude00"}') == {"a": "\N{GRINNING FACE}"}
