from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from lora_fx.export import Session, add_lora, export_adapter, to_onnx
from lora_fx.frontend.trace import trace
from lora_fx.numerics import compare
from lora_fx.testing import make_adapter


class Tied(nn.Module):
    def __init__(self, double: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 5, dtype=torch.float64 if double else None)
        self.bias = nn.Parameter(torch.randn(6).to(self.table.weight.dtype))

    def forward(self, ids: torch.Tensor) -> Any:
        return nn.functional.linear(self.table(ids), self.table.weight, self.bias)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("sizes", [(4,), (4, 7), (2, 4, 7)])
def test_a_tied_weight_is_multiplied_where_it_lies(
    sizes: tuple[int, ...], double: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 6, sizes)
    shapes = {"ids": {axis: f"axis{axis}" for axis in range(len(sizes))}}
    report = to_onnx(
        trace(Tied(double).eval(), (ids,), dynamic_shapes=shapes), tmp_path / "model.onnx"
    )
    assert report.verified
    assert len({row.shape for row in report.checks}) == 4
    graph = onnx.load(tmp_path / "model.onnx").graph
    readers = {n.op_type for n in graph.node if "table.weight" in n.input}
    assert readers == {"Gather", "Gemm"}
    assert not any(node.op_type in ("MatMul", "Transpose") for node in graph.node)
    (value,) = graph.output
    axes = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
    assert axes == [*(f"axis{axis}" for axis in range(len(sizes))), 6]


def test_a_transposed_weight_that_is_an_output_stays(tmp_path: Path) -> None:
    class Shown(Tied):
        def forward(self, ids: torch.Tensor) -> Any:
            return super().forward(ids), self.table.weight.T

    gm = trace(Shown().eval(), (torch.randint(0, 6, (4, 7)),))
    assert to_onnx(gm, tmp_path / "model.onnx").verified
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert sum(node.op_type == "Transpose" for node in nodes) == 1


def test_a_tied_head_keeps_its_name_and_takes_a_slot(tmp_path: Path) -> None:
    """The weight bears either name, and tells the head no more once the table has it."""

    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(6, 5), nn.Linear(5, 6, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> Any:
            return self.head(self.table(ids))

    torch.manual_seed(0)
    model, ids = Headed().eval(), torch.randint(0, 6, (4, 7))
    to_onnx(trace(model, (ids,)), tmp_path / "base.onnx", output_names=["y"])
    assert add_lora(tmp_path / "base.onnx", tmp_path / "slots.onnx").slots == ["head"]
    adapter = make_adapter({"head": (6, 5)}, scale=0.3)
    export_adapter(adapter, tmp_path / "slots.onnx", tmp_path / "a.onnx_adapter")
    found = Session(tmp_path / "slots.onnx").run({"ids": ids}, tmp_path / "a.onnx_adapter")["y"]
    update: Any = adapter.updates["head"]
    with torch.no_grad():
        hidden, own = model.table(ids), model.head.weight
        assert compare(found, hidden @ (own + update.delta()).T).ok
        assert not compare(found, hidden @ (own + 0.9 * update.delta()).T).ok
