"""One file of tensors, either container."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lora_fx.errors import AdapterError
from lora_fx.io.state_dict import metadata_of, names_in, read_file, write_file

TENSORS = {"b": torch.randn(5, 3).T, "a.alpha": torch.tensor(1.5), "c": torch.randn(2).bfloat16()}


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_what_is_written_is_read_bit_for_bit(tmp_path: Path, name: str) -> None:
    write_file(tmp_path / name, TENSORS, {"key": "text"}, False, (".pt",))
    found = read_file(tmp_path / name, allow_pickle=True)
    assert set(names_in(tmp_path / name, allow_pickle=True)) == set(found) == set(TENSORS)
    assert all(torch.equal(found[key], tensor) for key, tensor in TENSORS.items())
    assert all(found[key].dtype == tensor.dtype for key, tensor in TENSORS.items())
    text = {} if name == "a.pt" else {"format": "pt", "key": "text"}
    assert metadata_of(tmp_path / name) == text
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_same_tensors_make_the_same_bytes(tmp_path: Path) -> None:
    texts = {key: f"texté {key}" for key in "fbadce"}
    for number in range(8):
        write_file(tmp_path / f"{number}.safetensors", TENSORS, texts, False)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    with safe_open(tmp_path / "0.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", **texts}


def test_tied_and_trained_tensors_are_written(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 5))
    write_file(tmp_path / "a.safetensors", {"x": weight, "y": weight.T}, {}, False)
    found = load_file(tmp_path / "a.safetensors")
    assert torch.equal(found["x"], weight.detach())
    assert torch.equal(found["y"], weight.detach().T)


@pytest.mark.parametrize("name", ["a.bin", "a.PT", "a.pth", "a.ckpt"])
def test_a_pickle_is_read_only_when_asked_for(tmp_path: Path, name: str) -> None:
    torch.save({"a": torch.nn.Parameter(torch.ones(3))}, tmp_path / name)
    for read in (read_file, names_in):
        with pytest.raises(AdapterError, match=r"a pickle can run code .* allow_pickle=True"):
            read(tmp_path / name, allow_pickle=False)
    found = read_file(tmp_path / name, allow_pickle=True)["a"]
    assert not found.requires_grad
    assert metadata_of(tmp_path / name) == {}


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="a directory, expected one file of tensors"):
        read_file(tmp_path, allow_pickle=False)


@pytest.mark.parametrize("name", ["a", "a.pt", "a.onnx", "a.SAFETENSORS"])
def test_another_ending_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterError, match=r"ends in \.safetensors$"):
        write_file(tmp_path / name, TENSORS, {}, False)
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_no_reader_accepts_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="'a' holds NaN"):
        write_file(tmp_path / "a.safetensors", {"a": torch.tensor([torch.nan])}, {}, False)
    assert list(tmp_path.iterdir()) == []
