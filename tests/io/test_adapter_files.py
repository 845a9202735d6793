"""Which of two kinds a file is, told by its first bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from lora_fx.io.adapter_files import KEY, is_ort_adapter, is_slot_tensors

TENSORS = {"a.lora_A": torch.ones(2, 3)}
FILES = {
    "onnxruntime's": (b"\x20\0\0\0TORT\0\0", True, False),
    "ours": (save(TENSORS, {KEY: "{}"}), False, True),
    "a trainer's": (save(TENSORS, {"format": "pt"}), False, False),
    "a trainer's that speaks of ours": (save(TENSORS, {"made_by": KEY}), False, False),
    "empty": (b"", False, False),
    "short": (b"\x09\0\0\0\0\0\0\0", False, False),
    "text": (b'{"lora_fx.adapter": 1}', False, False),
    "a header without end": (b"\xff" * 8 + f'{{"{KEY}":1}}'.encode(), False, False),
    "a pickle": (b"PK\x03\x04" + b"\0" * 40, False, False),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_told_by_how_it_begins(name: str, tmp_path: Path) -> None:
    content, ort, ours = FILES[name]
    path = tmp_path / "any.name"
    path.write_bytes(content)
    assert (is_ort_adapter(path), is_slot_tensors(path)) == (ort, ours)


def test_what_is_no_file_is_neither(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        assert not is_ort_adapter(path)
        assert not is_slot_tensors(path)
