"""Pickled state dicts: only plain tensors, only from a plain archive."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
import torch

from lora_fx.errors import AdapterError
from lora_fx.io.state_dict import read_pickle


def test_a_state_dict_is_read(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(5, 3), "b": torch.randn(2).bfloat16()}
    torch.save(tensors, tmp_path / "a.bin")
    found = read_pickle(tmp_path / "a.bin")
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_the_one_state_dict_of_a_checkpoint_is_read(tmp_path: Path) -> None:
    own, step = {"a": torch.randn(5, 3)}, {"step": 3, "lr": 0.1}
    torch.save({"state_dict": own, "epoch": 2, "optimizer": step}, tmp_path / "a.ckpt")
    assert torch.equal(read_pickle(tmp_path / "a.ckpt")["a"], own["a"])
    torch.save({"model": own, "ema": own}, tmp_path / "a.ckpt")
    with pytest.raises(AdapterError, match=r"no state dict.*has model, ema, save the one"):
        read_pickle(tmp_path / "a.ckpt")


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("exploded",)


def test_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Bomb()}, "a.bin")
    with pytest.raises(AdapterError, match=r"a\.bin: not a file of plain tensors"):
        read_pickle(Path("a.bin"))
    assert not Path("exploded").exists()


@pytest.mark.parametrize("content", [[torch.ones(2)], {"a": 3}, {1: torch.ones(2)}])
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(AdapterError, match=r"a\.bin: holds no state dict"):
        read_pickle(tmp_path / "a.bin")


def test_the_rules_for_tensors_hold(tmp_path: Path) -> None:
    torch.save({"bad": torch.tensor([torch.nan])}, tmp_path / "a.bin")
    with pytest.raises(AdapterError, match="'bad' holds NaN"):
        read_pickle(tmp_path / "a.bin")
    torch.save({"bad": torch.ones(1).expand(1000)}, tmp_path / "a.bin")
    with pytest.raises(AdapterError, match=r"'bad' is .*expanded"):
        read_pickle(tmp_path / "a.bin")


def test_another_container_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(AdapterError, match=r"a\.bin: not a PyTorch archive"):
        read_pickle(tmp_path / "a.bin")


@pytest.mark.parametrize(
    ("name", "compression", "message"),
    [
        ("a/../../b", zipfile.ZIP_STORED, r"member 'a/\.\./\.\./b' leaves it"),
        ("/etc/b", zipfile.ZIP_STORED, "member '/etc/b' leaves it"),
        ("a/b", zipfile.ZIP_DEFLATED, "member 'a/b' is compressed"),
    ],
)
def test_a_foul_archive_is_refused(
    tmp_path: Path, name: str, compression: int, message: str
) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.bin")
    with zipfile.ZipFile(tmp_path / "a.bin", "a") as archive:
        archive.writestr(name, b"\0" * 4096, compress_type=compression)
    with pytest.raises(AdapterError, match=message):
        read_pickle(tmp_path / "a.bin")


def test_a_member_twice_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.bin")
    with zipfile.ZipFile(tmp_path / "a.bin", "a") as archive:
        first = archive.namelist()[0]
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(first, b"")
    with pytest.raises(AdapterError, match="two members of one name"):
        read_pickle(tmp_path / "a.bin")
