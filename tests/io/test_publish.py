from __future__ import annotations

import os
from pathlib import Path

import pytest

from lora_fx.errors import ExportError
from lora_fx.io.publish import data_path, staged


def publish(
    target: Path, failure: Exception | None, *, force: bool = False, meanwhile: str | None = None
) -> None:
    with staged(target, force=force) as draft:
        draft.write_text("new")
        if meanwhile is not None:
            target.write_text(meanwhile)
        if failure is not None:
            raise failure


def test_files_appear_together_and_the_target_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    replace = os.replace

    def watched(source: Path, target: Path) -> None:
        order.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr("lora_fx.io.publish.os.replace", watched)
    target = tmp_path / "model.onnx"
    with staged(target) as draft:
        draft.write_text("model")
        data_path(draft).write_text("weights")
        assert not target.exists()
    assert order == ["model.onnx.data", "model.onnx"]
    assert {path.name for path in tmp_path.iterdir()} == set(order)


def test_a_failure_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError):
        publish(target, ZeroDivisionError(), force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert target.read_text() == "old"


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    with pytest.raises(ExportError, match="exists"):
        publish(target, None, meanwhile="theirs")
    assert target.read_text() == "theirs"


def test_a_full_disk_is_an_error_that_names_the_target(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    with pytest.raises(ExportError, match=r"model\.onnx: cannot be written: .*No space"):
        publish(target, OSError(28, "No space left on device"))
    assert list(tmp_path.iterdir()) == []


def test_targets_that_cannot_be_are_refused_first(tmp_path: Path) -> None:
    (tmp_path / "model.onnx.data").write_text("someone's")
    for target, reason in {
        tmp_path / "no" / "model.onnx": "directory does not exist",
        tmp_path: "is a directory",
        tmp_path / "model.onnx": r"model\.onnx\.data: exists",
    }.items():
        with pytest.raises(ExportError, match=reason):
            publish(target, AssertionError("the body must not run"))
