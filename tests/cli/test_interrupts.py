"""Ctrl-C, wherever Python is just then: 130, one line, no traceback, nothing written."""

from __future__ import annotations

import importlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lora_fx.cli.error_exit import report
from lora_fx.cli.interrupts import INTERRUPTED, interruptible

SLOW = """
import time
import torch


class Slow(torch.nn.Linear):
    def forward(self, input):
        print("forward", flush=True)
        return super().forward(input)


def make():
    return Slow(3, 5).eval(), (torch.ones(2, 3),)


def sleeps():
    print("asleep", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """What runs in the background was started with the signal ignored, its children too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


STARTED = """
import sys
from lora_fx.cli import main

print("started", file=sys.stderr, flush=True)
main(sys.argv[1:])
"""


def in_an_import() -> None:
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt as error:
        raise ImportError("numpy.core failed to import") from error


def in_a_destructor() -> None:
    class Heavy:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    Heavy()
    time.sleep(10)  # the signal is lost there, and comes again


def while_arguments_are_read() -> None:
    """typer ends with 1 then."""
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        sys.exit(1)


@pytest.mark.parametrize(
    "work", [in_an_import, in_a_destructor, while_arguments_are_read], ids=lambda f: f.__name__
)
def test_whatever_was_made_of_it_is_an_interrupt(
    work: Callable[[], None], capfd: pytest.CaptureFixture[str]
) -> None:
    start = time.perf_counter()
    with pytest.raises(SystemExit) as ended, interruptible():
        work()
    assert ended.value.code == INTERRUPTED
    assert time.perf_counter() - start < 5
    assert "Traceback" not in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_import_is_finished_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ that is just being loaded would end the process."""
    (tmp_path / "loads_slowly.py").write_text(
        "import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(0.2)\ndone = True\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def loads() -> None:
        importlib.import_module("loads_slowly")
        time.sleep(10)

    with pytest.raises(SystemExit) as ended, interruptible():
        loads()
    assert ended.value.code == INTERRUPTED
    assert sys.modules.pop("loads_slowly").done


def test_an_import_that_never_ends_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "never_loads.py").write_text(
        "import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(60)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("lora_fx.cli.interrupts._LONGEST", 0.5)
    start = time.perf_counter()
    with pytest.raises(SystemExit) as ended, interruptible():
        importlib.import_module("never_loads")
    assert ended.value.code == INTERRUPTED
    assert time.perf_counter() - start < 10


def test_an_error_on_its_way_is_told_as_an_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    def tells() -> None:
        try:
            in_an_import()
        except ImportError as lost:
            sys.exit(report(lost))

    with pytest.raises(SystemExit) as ended, interruptible():
        tells()
    assert ended.value.code == INTERRUPTED
    assert capsys.readouterr().err == "error: interrupted\n"


def test_errors_without_an_interrupt_stay(capsys: pytest.CaptureFixture[str]) -> None:
    """The control."""
    with pytest.raises(ImportError), interruptible():
        raise ImportError
    with pytest.raises(SystemExit) as ended, interruptible():
        sys.exit(2)
    assert ended.value.code == 2
    assert report(ImportError("mine")) == 2
    assert "mine" in capsys.readouterr().err


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As of what a script runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def interrupted(home: Path, function: str, wait: Callable[[subprocess.Popen[str]], None]) -> str:
    """What an export says that is interrupted when `wait` returns."""
    (home / "slow.py").write_text(SLOW)
    command = [sys.executable, "-c", STARTED, "export", f"slow.py:{function}", "-o", "out"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, cwd=home, **pipes) as running:
        assert running.stderr is not None
        assert running.stderr.readline() == "started\n"  # before, Python says what it wants to
        wait(running)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    assert running.returncode in (INTERRUPTED, 0)
    assert (running.returncode == 0) == (home / "out").exists()
    assert {file.name for file in home.iterdir()} <= {"slow.py", "out", "__pycache__"}
    return said


def test_the_users_code_is_interrupted(tmp_path: Path) -> None:
    def until_it_runs(running: subprocess.Popen[str]) -> None:
        assert running.stderr is not None  # stdout is for results
        assert running.stderr.readline() == "asleep\n"

    assert interrupted(tmp_path, "sleeps", until_it_runs) == "error: interrupted\n"


@pytest.mark.parametrize("seed", range(3))
def test_at_any_time_there_is_no_traceback(seed: int, tmp_path: Path) -> None:
    """From when Python has started: imports, tracing, writing, verifying."""
    after = random.Random(seed).uniform(0.1, 5.0)
    said = interrupted(tmp_path, "make", lambda running: time.sleep(after))
    assert "Traceback" not in said
