"""Completion, as bash asks for it: commands, options, and the words of options."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_fx import choices
from lora_fx.cli import main

ASK = """
eval "$(lora-fx completion bash)"
while IFS= read -r line; do
  IFS=' ' read -ra COMP_WORDS <<< "$line"
  [[ "$line" == *' ' ]] && COMP_WORDS+=("")
  COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
  _lora_fx_completion lora-fx
  echo "${COMPREPLY[*]}"
done
"""
ASKED = {
    "lora-fx ex": {"export"},
    "lora-fx export --mo": {"--model", "--mode"},
    "lora-fx export m.py:f --mode ": set(choices.words(choices.Mode)),
    "lora-fx export --dtype ": {"float32", "float16"},
    "lora-fx quantize x.onnx --bits n": {"nf4"},
    "lora-fx adapter french/ --to p": {"peft", "peft_file"},
    "lora-fx verify x.onnx --task text-c": {"text-classification"},
    "lora-fx inspect --format ": set(choices.words(choices.Format)),
    "lora-fx completion ": {"bash", "zsh", "fish"},
    "lora-fx export ": set(),  # of files, by bash itself
}


def test_bash_completes_commands_options_and_words(tmp_path: Path) -> None:
    program = tmp_path / "lora-fx"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lora_fx "$@"\n')
    program.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", ASK], input="".join(f"{line}\n" for line in ASKED),
        capture_output=True, text=True, check=True, env={**os.environ, "PATH": path},
    )  # fmt: skip
    assert done.stderr == ""
    found = [set(line.split()) for line in done.stdout.splitlines()]
    assert dict(zip(ASKED, found, strict=True)) == ASKED


@pytest.mark.parametrize(("shell", "has"), [("zsh", "#compdef lora-fx"), ("fish", "complete -")])
def test_other_shells_have_scripts(
    shell: str, has: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["completion", shell])
    assert not ended.value.code
    said = capsys.readouterr().out
    assert has in said
    assert "_LORA_FX_COMPLETE=complete_" + shell in said


def test_another_shell_is_refused_with_those_that_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["completion", "tcsh"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: completion 'tcsh': expected 'bash', 'zsh' or 'fish'\n"
    )
