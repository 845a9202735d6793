from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_fx.export import to_onnx
from lora_fx.export.onnx_model.convert import convert
from lora_fx.export.program.decompose import LoweredProgram
from lora_fx.export.program.example_inputs import example_inputs
from lora_fx.export.program.without_retracing import program_of
from lora_fx.frontend.trace import trace

aten = torch.ops.aten


class Calls(nn.Module):
    """What torch's exporter takes apart, and what does nothing out of training."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> Any:
        with torch.no_grad():
            scale, shift = x.mean(-1, keepdim=True).double().float(), x.mean()
        y = nn.functional.dropout(self.fc(x) * scale, 0.5, self.training).to(torch.float64)
        mask = (y > 0) & (y < shift)
        return torch.min(y, shift), mask, y.movedim(0, 1)


def program(x: torch.Tensor) -> LoweredProgram:
    gm = trace(Calls().eval(), (x,))
    found = program_of(gm, example_inputs(gm, None, None, None))
    assert isinstance(found, LoweredProgram)
    return found


def called(found: LoweredProgram) -> set[Any]:
    return {node.target for node in found.graph.nodes if node.op == "call_function"}


def test_blocks_under_no_grad_stand_in_the_graph() -> None:
    names = {str(target) for target in called(program(torch.randn(4, 7, 3)))}
    assert "aten.mean.dim" in names
    assert not any("grad" in name for name in names)


def test_only_what_the_table_names_is_decomposed() -> None:
    found = program(torch.randn(4, 7, 3))
    table = {aten.__and__.Tensor: None, aten.min.other: None}
    before = called(found)
    assert table.keys() | {aten.dropout.default, aten.movedim.int} <= before
    assert found.run_decompositions(dict.fromkeys(table, torch.add)) is found
    after = called(found)
    assert aten.linear.default in after
    assert {aten.bitwise_and.Tensor, aten.minimum.default, aten._to_copy.default} <= after
    assert not {*table, aten.dropout.default, aten.movedim.int, aten.to.dtype} & after
    assert all("val" in node.meta for node in found.graph.nodes if node.op == "call_function")
    found.graph.lint()


def test_outputs_that_are_decomposed_need_no_second_trace() -> None:
    class Ends(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            y = torch.relu(x)
            kept = nn.functional.dropout(y, 0.5, self.training)
            return y.movedim(0, 1), kept, {"again": kept}

    gm = trace(Ends().eval(), (torch.randn(4, 7, 3),))
    found = program_of(gm, example_inputs(gm, None, None, None))
    assert isinstance(found, LoweredProgram)
    assert len(convert(found, None).graph.outputs) == 3


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_they_export_either_way(frontend: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 7, 3)
    shapes = {"x": {0: "batch", 1: "length"}}
    gm = trace(Calls().train(), (x,), dynamic_shapes=shapes, frontend=frontend)
    assert to_onnx(gm, tmp_path / "model.onnx").verified
