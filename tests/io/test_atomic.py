"""A file, several files or a directory: whole and checked at their place, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from lora_fx.errors import AdapterError, ExportError
from lora_fx.io.atomic import (
    data_path,
    publish,
    refuse_files,
    scratch,
    staged,
    staged_files,
)

FILES = {"adapter_config.json": b"new"}
NAMES = ("model", "report")


def refuse_once(
    monkeypatch: pytest.MonkeyPatch, place: Path, problem: BaseException | None = None
) -> None:
    """Lets the first move to a place fail, as on a full disk; what puts things back may move."""
    replace, left = os.replace, [problem or OSError(28, "No space left on device")]

    def refusing(source: Path, target: Path) -> None:
        if Path(target) == place and left:
            raise left.pop()
        replace(source, target)

    monkeypatch.setattr("lora_fx.io.atomic.os.replace", refusing)


def everything(directory: Path) -> dict[str, str]:
    """Each file below a directory, and what it holds."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_text() for path in files}


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
    refuse_once(monkeypatch, tmp_path / "a")
    with pytest.raises(AdapterError, match=r"No space left on device: .*make room .*TMPDIR"):
        publish(tmp_path / "a", FILES, force=True)
    assert (tmp_path / "a" / "adapter_config.json").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_is_created_with_its_parents(tmp_path: Path) -> None:
    publish(tmp_path / "some" / "a.bin", b"new", force=False)
    assert (tmp_path / "some" / "a.bin").read_bytes() == b"new"
    assert [path.name for path in (tmp_path / "some").iterdir()] == ["a.bin"]


def test_a_file_is_replaced_only_with_force(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(AdapterError, match=r"a\.bin: exists already; .* force=True"):
        publish(tmp_path / "a.bin", b"new", force=False)
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    publish(tmp_path / "a.bin", b"new", force=True)
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
        publish(target, b"new", force=True)
    assert (tmp_path / "mine").read_bytes() == b"old"


def test_a_file_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.bin").write_bytes(b"old")
    refuse_once(monkeypatch, tmp_path / "a.bin")
    with pytest.raises(AdapterError, match="No space left on device"):
        publish(tmp_path / "a.bin", b"new", force=True)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def write_model(
    target: Path,
    failure: BaseException | None,
    *,
    force: bool = False,
    meanwhile: str | None = None,
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

    monkeypatch.setattr("lora_fx.io.atomic.os.replace", watched)
    target = tmp_path / "model.onnx"
    with staged(target) as draft:
        draft.write_text("model")
        data_path(draft).write_text("weights")
        assert not target.exists()
    assert order == ["model.onnx.data", "model.onnx"]
    assert {path.name for path in tmp_path.iterdir()} == set(order)


def test_a_failing_model_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError):
        write_model(target, ZeroDivisionError(), force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert target.read_text() == "old"


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    with pytest.raises(ExportError, match="exists"):
        write_model(target, None, meanwhile="theirs")
    assert target.read_text() == "theirs"


def test_a_full_disk_is_an_error_that_names_the_target(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    with pytest.raises(ExportError, match=r"model\.onnx: cannot be written: .*No space"):
        write_model(target, OSError(28, "No space left on device"))
    assert list(tmp_path.iterdir()) == []


def test_targets_that_cannot_be_are_refused_first(tmp_path: Path) -> None:
    (tmp_path / "model.onnx.data").write_text("someone's")
    for target, reason in {
        tmp_path / "no" / "model.onnx": "directory does not exist",
        tmp_path: "is a directory",
        tmp_path / "model.onnx": r"model\.onnx\.data: exists",
    }.items():
        with pytest.raises(ExportError, match=reason):
            write_model(target, AssertionError("the body must not run"))


def test_files_appear_together(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with staged_files(out, NAMES, "model", False) as draft:
        for name in NAMES:
            (draft / name).write_text(name)
        assert not out.exists()
    assert {file.name: file.read_text() for file in out.iterdir()} == {n: n for n in NAMES}
    assert list(out.parent.iterdir()) == [out]


def test_failing_files_leave_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with staged_files(tmp_path / "out", NAMES, "model", False) as draft:
            (draft / "model").write_text("half")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_appears_meanwhile_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def write(force: bool) -> None:
        with staged_files(out, NAMES, "model", force) as draft:
            (draft / "model").write_text("new")
            out.mkdir(exist_ok=True)
            (out / "model").write_text("mine")

    with pytest.raises(ExportError, match="holds model already: pass --force"):
        write(False)
    assert (out / "model").read_text() == "mine"
    write(True)
    assert (out / "model").read_text() == "new"


def test_only_the_files_to_write_are_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    refuse_files(tmp_path, NAMES, False)
    with pytest.raises(ExportError, match="notes: is a file: give a directory"):
        refuse_files(tmp_path / "notes", NAMES, True)
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ExportError, match="out: cannot be created"),
        staged_files(tmp_path / "file" / "out", NAMES, "model", False),
    ):
        pass


# How each is written anew over what is there: the target, and what was there before.
def write_directory(home: Path) -> None:
    publish(home / "a", FILES | {"README.md": b"new"}, force=True)


def write_file(home: Path) -> None:
    publish(home / "a.bin", b"new", force=True)


def write_both(home: Path) -> None:
    with staged(home / "model.onnx", force=True) as draft:
        draft.write_text("new")
        data_path(draft).write_text("new")


def write_alone(home: Path) -> None:
    with staged(home / "model.onnx", force=True) as draft:
        draft.write_text("new")


def write_files(home: Path) -> None:
    with staged_files(home / "out", NAMES, "model", True) as draft:
        for name in NAMES:
            (draft / name).write_text("new")


WRITERS = {
    "a": (write_directory, {"a/adapter_config.json": "old"}),
    "a.bin": (write_file, {"a.bin": "old"}),
    "model.onnx": (write_both, {"model.onnx": "old", "model.onnx.data": "old"}),
    "gone": (write_alone, {"model.onnx": "old", "model.onnx.data": "old"}),
    "out/model": (write_files, {"out/model": "old", "out/report": "old", "out/mine": "mine"}),
}


@pytest.mark.parametrize("problem", [OSError(28, "full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("last", WRITERS)
def test_if_the_last_move_fails_all_is_as_it_was(
    last: str, problem: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, before = WRITERS[last]
    for name, content in before.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with monkeypatch.context() as patch:
        if last == "gone":
            replace = os.replace

            def refusing(source: Path, target: Path) -> None:
                if Path(source) == tmp_path / "model.onnx.data":
                    raise problem
                replace(source, target)

            patch.setattr("lora_fx.io.atomic.os.replace", refusing)
        else:
            refuse_once(patch, tmp_path / last, problem)
        with pytest.raises((AdapterError, ExportError, KeyboardInterrupt)):
            write(tmp_path)
    assert everything(tmp_path) == before
    assert list(tmp_path.rglob(".*")) == []
    write(tmp_path)
    assert set(everything(tmp_path).values()) - {"mine"} == {"new"}
    assert ("model.onnx.data" in everything(tmp_path)) == (last == "model.onnx")


def test_an_interrupt_of_the_body_leaves_nothing(tmp_path: Path) -> None:
    def interrupt() -> None:
        target = tmp_path / "deep" / "down" / "out"
        with staged_files(target, NAMES, "model", False) as draft:
            (draft / "model").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert list(tmp_path.iterdir()) == []


def test_what_has_links_or_a_mode_of_its_own_is_replaced_not_written(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("old")
    os.link(tmp_path / "model.onnx", tmp_path / "copy")
    write_alone(tmp_path)
    assert everything(tmp_path) == {"model.onnx": "new", "copy": "old"}
    write_files(tmp_path)
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_filesystem_without_links_is_written_to_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*paths: Path, **options: bool) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("lora_fx.io.atomic.os.link", no_links)
    (tmp_path / "model.onnx").write_text("old")
    refuse_once(monkeypatch, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="No space"):
        write_both(tmp_path)
    assert everything(tmp_path) == {"model.onnx": "old"}
    write_both(tmp_path)
    assert everything(tmp_path) == {"model.onnx": "new", "model.onnx.data": "new"}


def test_a_message_names_the_place_and_not_the_draft(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(ExportError) as raised,
        staged_files(out, ["model.onnx"], "model.onnx", False) as draft,
    ):
        raise ExportError(f"{draft / 'model.onnx'}: damaged")
    assert str(raised.value) == f"{out / 'model.onnx'}: damaged"


def test_a_directory_that_cannot_be_closed_any_more_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written is at its place by then."""

    def fails(path: Path, **_: object) -> None:
        raise OSError(errno.EIO, f"{path}")

    monkeypatch.setattr(shutil, "rmtree", fails)
    publish(tmp_path / "a.bin", b"new", force=True)
    assert (tmp_path / "a.bin").read_bytes() == b"new"


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_no_room_for_temporary_files_is_said_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    wanted = r"temporary files .*No space left.*make room .*TMPDIR"
    with pytest.raises(ExportError, match=wanted), scratch() as directory:
        full(directory)
    with pytest.raises(FileNotFoundError), scratch() as directory:  # the control: it has room
        (directory / "a").read_bytes()
    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(ExportError, match=wanted), scratch():
        pass
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_everywhere_is_said_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python looks for a directory of temporary files by writing there."""

    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    wanted = r"a\.onnx: cannot be written: No space left"
    with pytest.raises(ExportError, match=wanted), staged(tmp_path / "a.onnx"):
        full()
    with pytest.raises(ExportError, match=r"No usable temporary directory .*make room"), scratch():
        pass
