"""One file of tensors, either container."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_fx.errors import AdapterError
from lora_fx.io import state_dict
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


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0)])
def test_what_was_not_gathered_is_refused_with_the_cause(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """DeepSpeed ZeRO-3 leaves tensors of shape [0] where a model is saved without gathering."""
    tensors, path = {"good": torch.ones(2), "x.lora_A.weight": torch.zeros(shape)}, tmp_path / name
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    with pytest.raises(AdapterError, match=r"'x\.lora_A\.weight': shape .*empty.*ZeRO-3.*zero_to_"):
        read_file(path, allow_pickle=True)


@pytest.mark.parametrize("leaf", ["lora_A", "lora_B", "lora_E"])
def test_what_was_pruned_to_nothing_is_read_where_its_rank_is(leaf: str, tmp_path: Path) -> None:
    path, shape = tmp_path / "a.safetensors", (5, 0) if leaf == "lora_B" else (0, 5)
    save_file({f"x.{leaf}": torch.zeros(shape)}, path)
    assert read_file(path, allow_pickle=False)[f"x.{leaf}"].shape == shape
    for other in (shape[::-1], (0,), (0, 0), (0, 5, 2)):
        save_file({f"x.{leaf}": torch.zeros(other)}, path)
        with pytest.raises(AdapterError, match="it is empty"):
            read_file(path, allow_pickle=False)


def test_what_an_index_names_is_read_from_every_file(tmp_path: Path) -> None:
    index, names = _sharded(tmp_path, {"a": 1, "b": 1, "c": 2})
    found = read_file(index, allow_pickle=False)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == names
    assert set(names_in(index, allow_pickle=False)) == set(names)
    assert metadata_of(index) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": "1.safetensors"}, "does not agree with 1.safetensors about b, expected"),
        ({"c": "1.safetensors"}, "does not agree with 1.safetensors about c"),
        ({"d": "2.safetensors"}, "does not agree with 2.safetensors about d"),
        ({"c": "3.safetensors"}, "names 3.safetensors, which are not there"),
        ({"c": "../2.safetensors"}, r"lie at '\.\./2\.safetensors', expected names of files"),
        ({"c": "w.index.json"}, "w.index.json: .* hold no tensors"),
    ],
)
def test_an_index_that_does_not_agree_with_its_files_is_refused(
    change: dict[str, str], message: str, tmp_path: Path
) -> None:
    index, _ = _sharded(tmp_path, {"a": 1, "b": 1, "c": 2})
    names = json.loads(index.read_text())["weight_map"]
    names = change if message.endswith("expected") else names | change
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(AdapterError, match=message):
        read_file(index, allow_pickle=False)


def _sharded(path: Path, places: dict[str, int]) -> tuple[Path, dict[str, tuple[int, ...]]]:
    tensors = {name: torch.randn(3, at + 1) for at, name in enumerate(places)}
    for number in set(places.values()):
        own = {name: tensors[name] for name, at in places.items() if at == number}
        save_file(own, path / f"{number}.safetensors")
    names = {name: f"{number}.safetensors" for name, number in places.items()}
    (path / "w.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return path / "w.index.json", {name: tuple(t.shape) for name, t in tensors.items()}


class _Makes:
    """Makes a directory when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self._place),)


def test_torch_runs_nothing_even_where_our_own_look_finds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_dict, "_check_archive", lambda path: None)
    torch.save({"a": torch.ones(2), "b": _Makes(tmp_path / "made")}, tmp_path / "a.pt")
    with pytest.raises(AdapterError, match="not a file of plain tensors"):
        state_dict.read_pickle(tmp_path / "a.pt")
    assert not (tmp_path / "made").exists()
