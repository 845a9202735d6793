"""A process killed while files move: the old set or the new one, and nothing of it is left over."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from lora_fx.errors import ExportError
from lora_fx.io.atomic import data_path, publish, staged, staged_files
from lora_fx.io.draft import PREFIX, hidden_directory, sweep

NAMES = ("model", "data", "report")


def write_files(home: Path, text: str) -> None:
    with staged_files(home / "out", NAMES, "model", True) as draft:
        for name in NAMES:
            (draft / name).write_text(text)


def write_model(home: Path, text: str) -> None:
    with staged(home / "model", force=True) as draft:
        draft.write_text(text)
        data_path(draft).write_text(text)


def write_smaller(home: Path, text: str) -> None:
    with staged(home / "model.onnx", force=True) as draft:
        draft.write_text(text)
        if text == "old":
            data_path(draft).write_text(text)


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


def killed_at(step: int, write: Callable[[Path, str], None], home: Path) -> bool:
    """Whether a process that writes died, of a signal, at that step of making and moving files."""
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
                return does(*args, **more)

            return step_

        for name in ("replace", "rename", "mkdir", "rmdir", "unlink"):
            setattr(os, name, dying(getattr(os, name)))
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
