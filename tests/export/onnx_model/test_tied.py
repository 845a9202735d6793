from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from lora_fx.export import to_onnx
from lora_fx.frontend.trace import trace


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
