"""Outputs that are inputs, hold one or lie in one, by whatever name; and paths that cannot be."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_fx.errors import AdapterError, ExportError, LoraFxError
from lora_fx.io.atomic import publish, staged, staged_files
from lora_fx.io.output_place import keeping


def write_directory(place: Path) -> None:
    publish(place, {"adapter_config.json": b"new"}, force=True)


def write_file(place: Path) -> None:
    publish(place, b"new", force=True)


def write_model(place: Path) -> None:
    with staged(place, force=True) as draft:
        draft.write_text("new")


def write_files(place: Path) -> None:
    with staged_files(place.parent, [place.name], place.name, True) as draft:
        (draft / place.name).write_text("new")


WRITERS = [write_directory, write_file, write_model, write_files]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A source directory ``a``, whose weights are a link to another, and ways to get there."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "weights").write_text("old")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("old")
    (tmp_path / "a" / "adapter_model.safetensors").symlink_to(tmp_path / "blobs" / "weights")
    (tmp_path / "s.onnx").write_text("old")
    (tmp_path / "s.onnx.data").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    os.link(tmp_path / "s.onnx", tmp_path / "hard")
    return tmp_path


def everything(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_text() for path in files}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    "place",
    [
        "a",
        "./blobs/../a",
        "a/adapter_config.json",
        "a/adapter_model.safetensors",
        "link/adapter_config.json",
        "a/new",
        "link/new",
        "blobs/weights",
        "blobs/../blobs/weights",
        "s.onnx",
        "hard",
        "s.onnx.data",
    ],
)
def test_an_output_is_no_input_and_in_none(home: Path, place: str, write: Callable[[Path], None]):
    before = everything(home)
    with (
        keeping(home / "a", str(home / "s.onnx"), None, "", home / "nowhere", "a\0b"),
        pytest.raises(LoraFxError, match=r"of this call.*write to another place"),
    ):
        write(home / place)
    assert everything(home) == before


def test_an_output_holds_no_input(home: Path) -> None:
    with (
        keeping(home / "a" / "adapter_config.json"),
        pytest.raises(AdapterError, match=r"holds an input of this call, .*adapter_config\.json"),
    ):
        write_directory(home / "a")


@pytest.mark.parametrize("write", WRITERS)
def test_beside_an_input_and_in_a_new_directory_of_it_is_written(
    home: Path, write: Callable[[Path], None]
) -> None:
    with keeping(home / "a", home / "s.onnx"):
        write(home / "beside")
        write_files(home / "a" / "onnx" / "model")
    assert (home / "a" / "onnx" / "model").read_text() == "new"
    shutil.rmtree(home / "a")
    write(home / "a")  # the control: it is the call that keeps them


def test_what_is_written_in_a_draft_is_nobody_s_input(home: Path) -> None:
    with keeping(home / "a"), staged_files(home / "a" / "onnx", ["model"], "model", False) as draft:
        write_model(draft / "model")
    assert (home / "a" / "onnx" / "model").read_text() == "new"


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    "place", ["a\0b", "x" * 300, "/".join("d" * 3000), "loop", "a\ud800", "\udcff"]
)
def test_a_place_that_cannot_be_is_told(
    tmp_path: Path, place: str, write: Callable[[Path], None]
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(LoraFxError, match="cannot be the path of a file: "):
        write(tmp_path / place)
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


def test_a_name_that_leaves_no_room_for_the_weights_beside_it_is_told_first(tmp_path: Path) -> None:
    with (
        pytest.raises(ExportError, match="File name too long"),
        staged(tmp_path / ("x" * 252)),
    ):
        raise AssertionError("the body must not run")
    write_file(tmp_path / ("x" * 255))


def test_a_link_to_elsewhere_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "model").write_text("old")
    (tmp_path / "out").symlink_to(tmp_path / "theirs")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model").symlink_to(tmp_path / "theirs" / "model")
    for place in (tmp_path / "out" / "model", tmp_path / "mine" / "model"):
        with pytest.raises(ExportError, match=r"is a link to .*theirs"):
            write_files(place)
    with pytest.raises(ExportError, match=r"is a link to .*theirs"):
        write_model(tmp_path / "mine" / "model")
    assert everything(tmp_path / "theirs") == {"model": "old"}


@pytest.mark.parametrize("write", WRITERS)
def test_what_is_no_plain_file_is_not_replaced(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    """A FIFO stands for a device, such as the null device, which root may replace."""
    os.mkfifo(tmp_path / "model")
    with pytest.raises(LoraFxError, match=r"model: is (a FIFO, so it is )?no plain"):
        write(tmp_path / "model")
    assert (tmp_path / "model").is_fifo()


def test_a_way_up_and_down_again_is_followed(tmp_path: Path) -> None:
    write_files(tmp_path / "not" / ".." / "out" / "model")
    assert everything(tmp_path) == {"out/model": "new"}
