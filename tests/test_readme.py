"""The README's Python leaves what it says, and the guide's pass is a pass."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_fx import text, trace
from lora_fx.passes import op_name
from lora_fx.testing import check_pass

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
*_, EXAMPLE = BLOCK.findall((ROOT / "README.md").read_text())
PASS, *_ = BLOCK.findall((ROOT / "docs" / "guides" / "own-pass.md").read_text())
IN_A_PROCESS_OF_ITS_OWN = """
import torch, lora_fx
from passes_of_mine import DropIdentity

class Copies(torch.nn.Module):
    def forward(self, x):
        return torch.tanh(x.clone()).clone()

gm = lora_fx.trace(Copies(), (torch.randn(4, 3),))
result = lora_fx.passes.Pipeline([DropIdentity()])(gm)
assert isinstance(DropIdentity(), lora_fx.passes.Pass)
lora_fx.testing.check_pass(DropIdentity(), gm)
print(lora_fx.text(result.graph_module))
print(*map(str, result.edits), sep="; ")
"""


def test_the_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(EXAMPLE, names)
    exec(EXAMPLE, names)  # a cell is run again
    assert {file.name for file in tmp_path.iterdir()} == {
        "merged.onnx",
        "model.onnx",
        "french.onnx_adapter",
    }
    assert "control" in capsys.readouterr().out


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of one's own, on the import path, that holds the guide's code as it stands."""
    (tmp_path / "passes_of_mine").mkdir()
    (tmp_path / "passes_of_mine" / "__init__.py").write_text(PASS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return "passes_of_mine"


def test_the_pass_runs(package: str) -> None:
    class Copies(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x.clone()).clone()

    mine = import_module(package)
    x = torch.randn(4, 3)
    seen = check_pass(mine.DropIdentity(), trace(Copies()), x, expected=torch.tanh(x))
    assert seen.after == "x = input()\ntanh = tanh(x)\nreturn tanh"
    assert text(seen.gm) == seen.after
    assert [str(edit) for edit in seen.result.edits] == ["drop ", "drop "]


@pytest.mark.usefixtures("package")
def test_import_lora_fx_is_all_that_an_author_needs() -> None:
    command = [sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "x = input()\ntanh = tanh(x)\nreturn [tanh]\ndrop ; drop \n"


@pytest.mark.usefixtures("package")
def test_a_pass_of_ones_own_that_is_wrong_is_seen() -> None:
    """The control: the harness must see a pass that drops what computes something."""
    (mine,) = (import_module("passes_of_mine"),)

    class DropTanh(mine.DropIdentity):
        def rewrite(self, editor: Any) -> None:
            (node,) = (n for n in editor.gm.graph.nodes if op_name(n) == "tanh")
            editor.replace(node, node.args[0])

    gm = trace(torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh()), (torch.randn(4, 3),))
    with pytest.raises(AssertionError, match="output 0 is not what is expected"):
        check_pass(DropTanh(), gm)
