"""Errors of the user's own code are told by file and line; those of ours are not theirs."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from lora_fx import Update
from lora_fx.cli.user_code import load_module, users_code, users_line
from lora_fx.errors import LoraFxError


def raised_by(function: object) -> BaseException:
    try:
        function()  # type: ignore[operator]
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def test_the_line_is_the_users_though_torch_raised() -> None:
    error = raised_by(lambda: torch.ones(2) @ torch.ones(3))
    assert "test_user_code.py" in users_line(error)
    assert "torch.ones(2) @ torch.ones(3)" in users_line(error)


def test_the_line_is_the_users_though_we_raised() -> None:
    error = raised_by(lambda: Update(torch.ones(2), torch.ones(3, 2), 1.0))
    assert "test_user_code.py" in users_line(error)
    assert "torch.ones(3, 2)" in users_line(error)


def test_an_error_of_ours_has_no_line_of_the_user() -> None:
    error = raised_by(lambda: load_module("no_module_of_this_name"))
    here = error.__traceback__
    while here is not None and here.tb_frame.f_code.co_filename == __file__:
        here = here.tb_next  # leaves out this test, which is nobody's but the user's
    assert here is not None
    assert users_line(error.with_traceback(here)) == ""


def test_filters_of_warnings_end_with_the_users_code() -> None:
    before = list(warnings.filters)
    with users_code("here"):
        warnings.simplefilter("ignore")
    assert list(warnings.filters) == before
    with pytest.raises(LoraFxError, match="here: StopIteration"), users_code("here"):
        raise StopIteration


def test_a_module_is_imported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    (tmp_path / "once_imported.py").write_text("VALUE = object()\n")
    first = load_module(str(tmp_path / "once_imported.py"))
    assert load_module(str(tmp_path / "once_imported.py")) is first
    assert load_module("once_imported") is first
