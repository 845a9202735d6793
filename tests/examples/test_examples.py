"""Each example runs as a user runs it, checks its own result, and says what it showed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
# Of each, a line that it prints only after its own checks, or what they compared.
SAID = {
    "classify_pairs": "right before, 100% in onnxruntime",
    "decoder_two_adapters": "down   62 kB [[2, 3, 2, 1, 0, 15,",
    "digits_cnn": "turned   base 17.9%, merged ",
    "notebook_layer": "folded to two layers; raised, saved for PEFT, and swapped in onnxruntime",
    "own_pass": "fold 2: 4 calls into one layer",
    "unregistered_method": "without a curve one linear layer is left of nine calls; with one,",
}


def run(file: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(file)]
    return subprocess.run(
        command, cwd=directory, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip


def test_every_example_is_run() -> None:
    assert [file.stem for file in EXAMPLES] == list(SAID)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_runs_and_leaves_nothing(file: Path, tmp_path: Path) -> None:
    done = run(file, tmp_path)
    assert done.returncode == 0, done.stderr
    assert SAID[file.stem] in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert f"python examples/{file.name}" in (file.read_text().split('"""')[1])


def test_an_example_that_is_wrong_fails(tmp_path: Path) -> None:
    """The control: an example without its rewrite ends in its own assertion."""
    code = (EXAMPLES[-2].parent / "unregistered_method.py").read_text()
    broken = tmp_path / "broken.py"
    broken.write_text(code.replace("folded = lora_fx.fold(gm)", "folded = gm"))
    done = run(broken, tmp_path)
    assert done.returncode == 1
    assert "AssertionError" in done.stderr
