"""What is said, and which code is given, for whatever is raised."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_fx
from lora_fx.cli.error_exit import _RIGHT, report
from lora_fx.errors import (
    AdapterError,
    ExportError,
    LoraFxError,
    PassError,
    TraceError,
    VerificationError,
    says_what_to_do,
)

CASES: list[tuple[BaseException, int, str]] = [
    (VerificationError("far off"), 1, "far off"),
    (AdapterError("no rank"), 2, "no rank"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (SystemExit(0), 2, "the code called sys.exit(0)"),
    (MemoryError(), 2, "MemoryError"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "not enough memory: free"),
    (OSError(12, "Cannot allocate memory"), 2, "not enough memory: free"),
    (ImportError("Exception caught: std::bad_alloc"), 2, "not enough memory: free"),
    (OSError(28, "No space left on device", "x.onnx"), 2, "No space left on device: 'x.onnx'"),
    (ModuleNotFoundError("No module named 'rich'"), 2, "pip install lora-fx"),
    (AssertionError(), 2, "AssertionError: this is a defect of lora-fx; set LORA_FX_TRACEBACK=1"),
]


@pytest.mark.parametrize(("error", "code", "message"), CASES)
def test_each_failure_has_a_code_and_one_message(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(error) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert ("defect" in shown.err) == isinstance(error, AssertionError)


@pytest.mark.parametrize("kind", [AdapterError, TraceError, PassError, ExportError, LoraFxError])
def test_a_message_without_a_step_gets_one(
    kind: type[LoraFxError], capsys: pytest.CaptureFixture[str]
) -> None:
    report(kind("x is y"))
    assert says_what_to_do(capsys.readouterr().err.replace("error: x is y", ""))
    for text in ("x is y; save it again", "x is y, expected z", "no x; there are a, b"):
        report(kind(text))
        assert capsys.readouterr().err == f"error: {text}\n"


def test_a_step_that_a_command_has_not_is_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    report(AdapterError("a matches nothing. Pass strict=False to leave it out"))
    shown = capsys.readouterr().err
    assert "strict" not in shown
    assert shown.startswith("error: a matches nothing; use the adapter as it was saved")


def raised(room: str) -> Iterator[tuple[str, str]]:
    """Each message that a room raises itself, names in capitals as the texts that they hold."""
    for file in sorted((Path(lora_fx.__file__).parent / room).rglob("*.py")):
        module = importlib.import_module(f"lora_fx.{room}.{file.stem}".removesuffix(".__init__"))
        for node in ast.walk(ast.parse(file.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(call, ast.Call) and call.args:
                yield f"{file.name}:{node.lineno}", _text(call.args[0], vars(module))


def _text(node: ast.AST, names: dict[str, object]) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, names) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        is_constant = isinstance(node.value, ast.Name) and node.value.id.isupper()
        return str(names.get(node.value.id, "")) if is_constant else "it"  # type: ignore[attr-defined]
    return str(node.value) if isinstance(node, ast.Constant) else ""


# Where the border adds the step, and what is said by a variable.
BORDERS = {"directory.py", "vocabulary.py", "pipeline.py", "user_code.py"}


@pytest.mark.parametrize("room", ["cli", "tasks"])
def test_what_a_command_refuses_itself_says_what_to_do(room: str) -> None:
    told = ((p, text) for p, text in raised(room) if p.split(":")[0] not in BORDERS)
    every = [(place, text) for place, text in told if " " in text]  # no other's, raised again
    assert len(every) > 10, "the control: messages are seen"
    bare = {
        place: text for place, text in every
        if not says_what_to_do(text) and not _RIGHT.search(text)
    }  # fmt: skip
    assert bare == {}


@pytest.mark.parametrize("closed", ["1", "2", "0 1 2"])
def test_streams_that_are_closed_get_a_place(closed: str, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "lora_fx", "inspect", str(tmp_path / "no.onnx")]
    ends = " ".join(f"{number}>&-" for number in closed.split())
    done = subprocess.run(
        ["/bin/sh", "-c", f'"$@" {ends}', "sh", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "defect" not in done.stderr
    assert ("no such file" in done.stderr) == ("2" not in closed)
