"""Directories and files appear complete or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lora_fx.errors import AdapterError
from lora_fx.io.staging import publish, publish_file

FILES = {"adapter_config.json": b"new"}


def test_a_directory_is_created_with_its_parents(tmp_path: Path) -> None:
    publish(tmp_path / "some" / "where", FILES, force=False)
    assert (tmp_path / "some" / "where" / "adapter_config.json").read_bytes() == b"new"
    assert [path.name for path in (tmp_path / "some").iterdir()] == ["where"]


def test_files_have_the_usual_mode(tmp_path: Path) -> None:
    publish(tmp_path / "a", FILES, force=False)
    (tmp_path / "plain").write_bytes(b"")
    expected = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "a" / "adapter_config.json").stat().st_mode == expected


@pytest.mark.parametrize("kind", ["directory", "empty", "file", "dangling"])
def test_an_existing_target_is_refused(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "a"
    if kind == "dangling":
        target.symlink_to(tmp_path / "nowhere")
    elif kind == "file":
        target.write_bytes(b"old")
    else:
        target.mkdir()
    if kind == "directory":
        (target / "adapter_config.json").write_bytes(b"old")
    with pytest.raises(AdapterError, match=r"a: exists already; .* force=True"):
        publish(target, FILES, force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_force_replaces_an_adapter(tmp_path: Path) -> None:
    publish(tmp_path / "a", {"adapter_config.json": b"old", "README.md": b"old"}, force=False)
    publish(tmp_path / "a", FILES, force=True)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["adapter_config.json"]
    assert (tmp_path / "a" / "adapter_config.json").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_force_replaces_nothing_but_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_bytes(b"old")
    with pytest.raises(AdapterError, match=r"more than an adapter.*thesis\.tex"):
        publish(tmp_path / "a", FILES, force=True)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(AdapterError, match="no plain directory"):
        publish(tmp_path / "link", FILES, force=True)
    assert (tmp_path / "a" / "thesis.tex").read_bytes() == b"old"


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="a: cannot be written"):
        publish(tmp_path / "a", {"adapter_config.json": b"x", "no/such/directory": b"x"}, False)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_replacement_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path / "a", {"adapter_config.json": b"old"}, force=False)
    rename = os.rename

    def refuse_the_stage(self: Path, target: Path) -> Path:
        if self.name.startswith(".a.") and not self.name.endswith(".old"):
            raise OSError(28, "No space left on device")
        rename(self, target)
        return target

    monkeypatch.setattr(Path, "rename", refuse_the_stage)
    with pytest.raises(AdapterError, match="No space left on device"):
        publish(tmp_path / "a", FILES, force=True)
    assert (tmp_path / "a" / "adapter_config.json").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_is_created_with_its_parents(tmp_path: Path) -> None:
    publish_file(tmp_path / "some" / "a.bin", b"new", force=False)
    assert (tmp_path / "some" / "a.bin").read_bytes() == b"new"
    assert [path.name for path in (tmp_path / "some").iterdir()] == ["a.bin"]


def test_a_file_is_replaced_only_with_force(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(AdapterError, match=r"a\.bin: exists already; .* force=True"):
        publish_file(tmp_path / "a.bin", b"new", force=False)
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    publish_file(tmp_path / "a.bin", b"new", force=True)
    assert (tmp_path / "a.bin").read_bytes() == b"new"


@pytest.mark.parametrize("kind", ["directory", "link", "dangling"])
def test_force_replaces_nothing_but_a_plain_file(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "a.bin"
    (tmp_path / "mine").write_bytes(b"old")
    if kind == "directory":
        target.mkdir()
    else:
        target.symlink_to(tmp_path / ("mine" if kind == "link" else "nowhere"))
    with pytest.raises(AdapterError, match=r"a\.bin: is no plain file"):
        publish_file(target, b"new", force=True)
    assert (tmp_path / "mine").read_bytes() == b"old"


def test_a_file_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    (tmp_path / "a.bin").write_bytes(b"old")
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(AdapterError, match="No space left on device"):
        publish_file(tmp_path / "a.bin", b"new", force=True)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
