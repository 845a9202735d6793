"""The README's Python runs as it stands, and its pass is a pass."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_fx import text, trace
from lora_fx.testing import check_pass

README = Path(__file__).parent.parent / "README.md"
EXAMPLE, PASS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
IMPORTS = """
from dataclasses import dataclass
from lora_fx.graph.editor import Editor
from lora_fx.graph.ops import module_path, op_name
from lora_fx.passes import Pass
"""


def test_the_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(EXAMPLE, {})
    assert {file.name for file in tmp_path.iterdir()} == {
        "merged.onnx",
        "model.onnx",
        "french.onnx_adapter",
    }
    assert "control" in capsys.readouterr().out


def test_the_pass_runs() -> None:
    class Copies(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x.clone()).clone()

    names: dict[str, Any] = {}
    exec(IMPORTS + PASS, names)
    x = torch.randn(4, 3)
    seen = check_pass(names["DropIdentity"](), trace(Copies()), x, expected=torch.tanh(x))
    assert seen.after == "x = input()\ntanh = tanh(x)\nreturn tanh"
    assert text(seen.gm) == seen.after
