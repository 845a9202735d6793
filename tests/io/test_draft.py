"""A process killed while files move: the old set or the new one, and nothing of it is left over."""

from __future__ import annotations

import errno
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from lora_fx.errors import ExportError, LoraFxError
from lora_fx.io import draft
from lora_fx.io.atomic import data_path, publish, staged, staged_files
from lora_fx.io.draft import PREFIX, hidden_directory, sweep

NAMES = ("model", "data", "report")


def write_files(home: Path, text: str) -> None:
    with staged_files(home / "out", NAMES, "model", True) as place:
        for name in NAMES:
            (place / name).write_text(text)


def write_model(home: Path, text: str) -> None:
    with staged(home / "model", force=True) as place:
        place.write_text(text)
        data_path(place).write_text(text)


def write_smaller(home: Path, text: str) -> None:
    with staged(home / "model.onnx", force=True) as place:
        place.write_text(text)
        if text == "old":
            data_path(place).write_text(text)


def write_directory(home: Path, text: str) -> None:
    publish(home / "a", {"adapter_config.json": text.encode(), "README.md": b"-"}, force=True)


def write_file(home: Path, text: str) -> None:
    publish(home / "a.bin", text.encode(), force=True)


# Who writes, and the file that is read first.
WRITERS = {
    write_files: "out/model",
    write_model: "model",
    write_smaller: "model.onnx",
    write_directory: "a/adapter_config.json",
    write_file: "a.bin",
}


def killed_at(
    step: int, write: Callable[[Path, str], None], home: Path, fails: int | None = None
) -> bool:
    """Whether a process that writes died, of a signal, at that step of making and moving files.

    So many steps before, one may fail.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of threads of others
        child = os.fork()
    if child == 0:
        left = [step]

        def dying(does: Callable[..., object]) -> Callable[..., object]:
            def step_(*args: object, **more: object) -> object:
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                if fails is not None and left[0] == fails:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return does(*args, **more)

            return step_

        for name in ("replace", "rename", "mkdir", "rmdir", "unlink"):
            setattr(os, name, dying(getattr(os, name)))
        with suppress(LoraFxError):
            write(home, "new")
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def texts(home: Path) -> dict[str, str]:
    files = (path for path in home.rglob("*") if path.is_file())
    return {str(path.relative_to(home)): path.read_text() for path in files}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("was_there", [True, False])
def test_at_whatever_step_it_is_killed(
    write: Callable[[Path, str], None], was_there: bool, tmp_path: Path
) -> None:
    steps = 0
    whole = []
    for name, text in (("old", "old"), ("new", "new")):
        made = tmp_path / name
        made.mkdir()
        if was_there or text == "new":
            write(made, text)
        whole.append(texts(made))
    while True:
        home = tmp_path / f"{steps}"
        home.mkdir()
        if was_there:
            write(home, "old")
        if not killed_at(steps, write, home):
            break
        shown = {n: t for n, t in texts(home).items() if not n.startswith(PREFIX)}
        shown = {n: t for n, t in shown.items() if f"/{PREFIX}" not in n}
        # No file of one set is read beside those of the other: while they move there is none.
        assert shown in whole or WRITERS[write] not in shown
        sweep(home)
        sweep(home / "out")
        assert texts(home) in whole
        steps += 1
    assert steps > 3
    assert list(home.rglob(f"{PREFIX}*")) == []


@pytest.mark.parametrize("write", [write_files, write_model])
def test_killed_while_what_moved_goes_back(
    write: Callable[[Path, str], None], tmp_path: Path
) -> None:
    died = 0
    for fails in range(4):
        for step in range(fails + 1, 20):
            home = tmp_path / f"{fails}-{step}"
            home.mkdir()
            write(home, "old")
            died += killed_at(step, write, home, fails)
            sweep(home)
            sweep(home / "out")
            assert len({*texts(home).values()}) == 1, (fails, step)
    assert died > 20


@pytest.mark.parametrize("write", [write_files, write_model])
def test_a_disk_that_takes_no_more_names_loses_nothing(
    write: Callable[[Path, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, left = os.replace, [0]

    def fails(*paths: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        own(*paths)

    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, fails)
    for step in range(5):
        home, left[0] = tmp_path / f"{step}", 1000
        home.mkdir()
        write(home, "old")
        left[0] = step
        with pytest.raises(ExportError, match="Disk quota exceeded"):
            write(home, "new")
        left[0] = 1000  # there is room again
        for place in (home, home / "out"):
            sweep(place)
        found = texts(home)
        assert len({*found.values()}) == 1, step
        assert len(found) == (3 if write is write_files else 2), step


def test_what_is_in_use_is_left_alone(tmp_path: Path) -> None:
    with hidden_directory(tmp_path) as hidden:
        (hidden / "new").mkdir()
        sweep(tmp_path)
        assert (hidden / "new").is_dir()
    assert list(tmp_path.iterdir()) == []


def test_the_next_run_clears_what_one_left(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}x" / "new").mkdir(parents=True)
    (tmp_path / f"{PREFIX}x" / "new" / "half").write_text("half")
    write_model(tmp_path, "new")
    assert texts(tmp_path) == {"model": "new", "model.data": "new"}
    (tmp_path / "out" / f"{PREFIX}y" / "new").mkdir(parents=True)
    write_files(tmp_path, "new")
    assert list(tmp_path.rglob(f"{PREFIX}*")) == []


@pytest.mark.parametrize("part", ["moving", "old"])
def test_a_directory_that_somebody_else_put_there_replaces_nothing(
    part: str, tmp_path: Path
) -> None:
    planted = tmp_path / f"{PREFIX}evil" / part
    planted.mkdir(parents=True)
    (planted / "thesis.tex").write_text("theirs")
    (tmp_path / "thesis.tex").write_text("mine")
    outside = tmp_path.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "kept").write_text("kept")
    (tmp_path / f"{PREFIX}link").symlink_to(outside)
    sweep(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "mine"
    assert (outside / "kept").read_text() == "kept"
    assert not planted.exists()


def test_a_place_below_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ExportError, match=r"model: cannot be created: .* is no directory"),
        staged_files(tmp_path / "file" / "model", NAMES, "model", False),
    ):
        raise AssertionError("the body must not run")


@pytest.mark.parametrize("call", ["shutil.rmtree", "lora_fx.io.draft._lock"])
def test_an_interrupt_while_all_is_settled_leaves_nothing(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file(tmp_path, "old")
    room, name = call.rsplit(".", 1)
    own, came = getattr(import_module(room), name), []

    def interrupted(*args: object, **options: object) -> object:
        if not came:
            came.append(call)
            raise KeyboardInterrupt
        return own(*args, **options)

    monkeypatch.setattr(call, interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path, "new")
    assert came
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_an_interrupt_at_any_line_leaves_nothing_when_the_process_ends(tmp_path: Path) -> None:
    left = [0]

    def interrupts(frame: FrameType, event: str, _: object) -> Any:
        if event == "line":
            left[0] -= 1
            if left[0] == -1:
                raise KeyboardInterrupt
        return interrupts if frame.f_code.co_filename == draft.__file__ else None

    came = 0
    while came >= 0:
        write_files(tmp_path, "old")
        left[0], before = came, sys.gettrace()
        sys.settrace(interrupts)
        try:
            write_files(tmp_path, "new")
            came = -2
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        draft._end_all()
        assert len({*texts(tmp_path).values()}) == 1
        assert {path.name for path in (tmp_path / "out").iterdir()} == {*NAMES}
        came += 1


def test_where_there_are_no_locks_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some filesystems of a network."""

    def refuses(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(draft.locks, "flock", refuses)
    write_file(tmp_path, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
