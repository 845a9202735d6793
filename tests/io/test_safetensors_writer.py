from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lora_fx.io.safetensors_writer import Made, write_tensors

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]


def test_a_file_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    made = {str(d): (torch.randn(3, 5) * 4).to(d).T for d in DTYPES} | {"one": torch.tensor(2.0)}
    made["none"] = torch.zeros(0, 4)
    entries = {n: Made(tuple(t.shape), t.dtype, lambda t=t: t) for n, t in made.items()}  # type: ignore[misc]
    write_tensors(tmp_path / "a.safetensors", entries)
    found = load_file(tmp_path / "a.safetensors")
    assert list(found) == sorted(made) or found.keys() == made.keys()
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in made.items())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_is_not_of_its_shape_is_refused(tmp_path: Path) -> None:
    entry = {"a": Made((2,), torch.float32, lambda: torch.zeros(3))}
    with pytest.raises(ValueError, match="shape"):
        write_tensors(tmp_path / "a.safetensors", entry)
