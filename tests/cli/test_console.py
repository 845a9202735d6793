"""What is shown where: results on stdout, progress and warnings on stderr."""

import io
import json
import re
import sys
import warnings

import pytest
from rich.console import Console

from lora_fx.cli import console
from lora_fx.cli.console import show, stages
from lora_fx.errors import AdapterWarning


def test_a_result_is_json_alone_or_text(capsys: pytest.CaptureFixture[str]) -> None:
    show(True, {"one": [1, 2.5]}, "text")
    assert json.loads(capsys.readouterr().out) == {"one": [1, 2.5]}
    show(False, {"one": 1}, "text")
    assert capsys.readouterr().out == "text\n"


def test_a_number_that_json_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        show(True, {"one": float("nan")}, "")


def test_nobody_watching_sees_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with stages() as progress:
        progress("trace")
        print("a library talks")
    assert capsys.readouterr() == ("", "a library talks\n")


def test_lines_have_the_seconds_of_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with stages(lines=True) as progress:
        progress("trace")
        assert capsys.readouterr().err == "trace ... "
        progress("export")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(r"\d+\.\d s\nexport \.\.\. \d+\.\d s\n", shown.err)


def test_a_stage_that_fails_ends_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with stages(lines=True) as progress:
            progress("trace")
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert re.fullmatch(r"trace \.\.\. \d+\.\d s\n", capsys.readouterr().err)


@pytest.mark.parametrize("lines", [False, True])
def test_a_terminal_shows_the_stage_and_keeps_its_line(
    lines: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def terminal(stderr: bool) -> Console:
        return Console(stderr=stderr, force_terminal=True, width=60, color_system=None)

    monkeypatch.setattr(console, "Console", terminal)
    with stages(lines) as progress:
        progress("trace")
        progress("export [all]")
    shown = capsys.readouterr().err
    assert "export" in shown
    assert bool(re.search(r"export \[all\]  \d+\.\d s\n", shown)) == lines
    assert bool(re.search(r"trace  \d+\.\d s\n", shown)) == lines


def test_only_our_warnings_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with stages():
        warnings.warn("of a library", FutureWarning, stacklevel=1)
        warnings.warn(AdapterWarning("no effect"), stacklevel=1)
    assert capsys.readouterr() == ("", "warning: no effect\n")
    with pytest.raises(FutureWarning):  # the filters of before are back
        warnings.warn("of a library", FutureWarning, stacklevel=1)


LINE = "check    ok   model    output    batch=4    a-name-with-hyphens relative 2.8e-07"


def test_a_line_is_folded_at_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    shown = console.fitted(f"head\n  {LINE}\n{'x' * 60}", sys.stdout).split("\n")
    assert shown == [
        "head",
        "  check  ok  model  output  batch=4",
        "      a-name-with-hyphens relative",
        "      2.8e-07",
        "x" * 60,
    ]


def test_a_line_that_fits_and_what_no_terminal_reads_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert console.fitted(LINE, sys.stdout) == LINE
    monkeypatch.delenv("COLUMNS")
    assert console.fitted(LINE * 9, io.StringIO()) == LINE * 9


def test_json_is_never_folded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    show(True, {"text": LINE}, "")
    assert json.loads(capsys.readouterr().out) == {"text": LINE}
