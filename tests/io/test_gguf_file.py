"""GGUF files: what a header says, what the bytes behind it are, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_fx.errors import AdapterError
from lora_fx.io.gguf_file import is_gguf, read_gguf_names, read_gguf_tensors, read_gguf_values
from tests.io.gguf_bytes import gguf

VALUES: dict[str, Any] = {"general.type": "adapter", "alpha": 1.5, "tokens": [3, 70_000]}
TENSORS = {
    "a": torch.arange(15.0).reshape(5, 3),
    "b": torch.arange(24.0).reshape(2, 3, 4).half(),
    "c": torch.tensor([1.5, -2]).bfloat16(),
}


def file_of(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    return path


def test_tensors_and_values_are_read_as_they_are(tmp_path: Path) -> None:
    path = file_of(tmp_path, gguf(VALUES, TENSORS))
    found = read_gguf_tensors(path)
    assert is_gguf(path)
    assert read_gguf_names(path) == list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert read_gguf_values(path) == {
        "general.type": "adapter", "alpha": "1.5", "tokens": "[3, 70000]",
    }  # fmt: skip


def test_q8_0_is_a_scale_times_whole_numbers_in_each_block(tmp_path: Path) -> None:
    numbers = torch.arange(-64, 64, dtype=torch.int8).reshape(2, 2, 32)
    scales = torch.tensor([[0.5, 0.25], [2.0, -1.0]]).half()
    blocks = b"".join(
        struct.pack("<e32b", scales[i, j], *numbers[i, j].tolist())
        for i in range(2)
        for j in range(2)
    )
    path = file_of(tmp_path, gguf({}, {"a": ((2, 64), 8, blocks)}))
    want = (scales[..., None].float() * numbers).reshape(2, 64)
    assert torch.equal(read_gguf_tensors(path)["a"], want)


def test_a_file_that_ends_anywhere_is_refused(tmp_path: Path) -> None:
    whole = gguf(VALUES, {"a": torch.ones(2, 16)})
    assert read_gguf_tensors(file_of(tmp_path, whole))["a"].shape == (2, 16)
    for end in range(4, len(whole)):
        with pytest.raises(AdapterError, match=r"a\.gguf: "):
            read_gguf_tensors(file_of(tmp_path, whole[:end]))


START = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q1sI", 1, b"k", 9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gguf({}, {"a": ((2, 16), 2, bytes(18))}), r"\(2, 16\) of type 2, expected F32"),
        (gguf({}, {"a": ((2, 16), 8, bytes(34))}), "with rows of whole blocks"),
        (gguf({}, {"a": torch.ones(0, 3)}), r"'a': shape \[0, 3\]|'a': shape \(0, 3\)"),
        (gguf({}, {"a": torch.full((2,), torch.inf)}), "'a' holds NaN"),
        (gguf({}, {"a": torch.ones(1, 1, 1, 1, 1)}), "5 axes"),
        (gguf({"general.alignment": "odd"}, {}), "general.alignment is odd"),
        (struct.pack("<4sIQQ", b"GGUF", 9, 0, 0), "version 9"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 1 << 60, 0), "tensors and 0 values"),
        (START + struct.pack("<IQ", 0, 1 << 62), "end within its header"),
        (START + struct.pack("<IQ", 8, 1 << 62), "end within its header"),
        (START + struct.pack("<IQ", 9, 1), "a list of type 9"),
        (struct.pack("<4sIQQQ2s", b"GGUF", 3, 0, 1, 2, b"\xff\xfe"), "not UTF-8"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_what_is_no_such_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=message):
        read_gguf_tensors(file_of(tmp_path, content))


def test_names_stand_once_and_bytes_follow_each_other(tmp_path: Path) -> None:
    whole = gguf({"k": 1.0, "l": 1.0}, {"a": torch.ones(8), "b": torch.ones(8)})
    twice = {b"\1\0\0\0\0\0\0\0b": b"\1\0\0\0\0\0\0\0a", b"\1\0\0\0\0\0\0\0l": b"\1\0\0\0\0\0\0\0k"}
    for old, new in twice.items():
        with pytest.raises(AdapterError, match="is there twice"):
            read_gguf_tensors(file_of(tmp_path, whole.replace(old, new)))
    place = struct.pack("<IQ", 0, 32)
    assert place in whole
    for offset in (0, 64, 1 << 62):
        with pytest.raises(AdapterError, match=f"'b': begins at {offset}, expected 32"):
            read_gguf_tensors(
                file_of(tmp_path, whole.replace(place, struct.pack("<IQ", 0, offset)))
            )
