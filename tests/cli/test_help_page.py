"""--help: at once, without torch, and readable in a terminal of 40 columns."""

from __future__ import annotations

import re
import resource
import subprocess
import sys

import pytest
import typer.main

from lora_fx.cli import main
from lora_fx.cli.program import app

COMMANDS = list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
LOADED = """
import sys
from lora_fx.cli import main
try:
    main(["--help"])
except SystemExit as end:
    assert not end.code
print({name.partition(".")[0] for name in sys.modules} & {"torch", "numpy", "onnx", "onnxruntime"})
"""


def test_help_loads_nothing_and_takes_less_than_a_second() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.endswith("set()\n"), done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    monkeypatch.setenv("COLUMNS", "40")
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_forty_columns_hold_every_option_whole(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(monkeypatch, capsys, command)
    assert max(map(len, text.splitlines())) <= 40
    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    options = [name for one in parameters for name in one.opts if name.startswith("--")]
    assert [name for name in options if not re.search(rf"^  .*{name}\b", text, re.M)] == []
    assert "…" not in text


def test_the_list_of_commands_says_their_first_sentence_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(monkeypatch, capsys)
    assert max(map(len, text.splitlines())) <= 40
    words = " ".join(text.split())
    assert "verified against the eager model." in words
    assert "..." not in text.partition("Commands:")[2]


def test_every_command_says_its_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = " ".join(shown(monkeypatch, capsys, "export").split())
    assert "merged, unmerged, swappable or required" in words
