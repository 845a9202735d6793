"""What is said, and which code is given, for whatever is raised."""

from __future__ import annotations

import pytest

from lora_fx.cli.error_exit import report
from lora_fx.errors import AdapterError, VerificationError

CASES: list[tuple[BaseException, int, str]] = [
    (VerificationError("far off"), 1, "far off"),
    (AdapterError("no rank"), 2, "no rank"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (SystemExit(0), 2, "the code called sys.exit(0)"),
    (MemoryError(), 2, "MemoryError"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "not enough memory: free"),
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
