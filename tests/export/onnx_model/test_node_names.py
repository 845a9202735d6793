"""Nodes are called after modules, and constants are tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from lora_fx import trace
from lora_fx.export import to_onnx
from lora_fx.testing import Attention, Experts, Ragged, Tied

CASES: dict[str, tuple[Any, torch.Tensor, Any, bool, list[str]]] = {
    "factors": (
        Ragged, torch.randn(1, 1, 3), ["wide"], False,
        ["wide/MatMul", "wide/Add", "wide/lora_A/MatMul", "wide/lora_B/MatMul", "wide/lora/Add"],
    ),
    "called twice": (
        Ragged, torch.randn(1, 1, 3), ["again"], False,
        ["again/lora_B/MatMul", "again/lora/Add", "again/lora_B/MatMul_1", "again/lora/Add_1"],
    ),
    "vectors": (
        Ragged, torch.randn(4, 6, 3), ["wide"], True,
        ["wide/lora_col/Mul", "wide/lora_A/MatMul", "wide/lora_B/MatMul", "wide/lora_gain/Mul"],
    ),
    "a weight made at each call": (
        Ragged, torch.randn(4, 300, 3), ["wide"], False, ["wide/lora/MatMul", "wide/lora/Add"],
    ),
    "in parts": (
        lambda: Attention(4, crossed=True), torch.randn(2, 3, 4), ["layer"], False,
        ["layer/lora_B/Slice", "layer/lora_B/MatMul", "layer/lora_B/MatMul_1", "layer/lora/Add"],
    ),
    "a table": (
        Tied, torch.randint(0, 6, (2, 3)), ["table"], False,
        ["table/Gather", "table/lora_A/Gather", "table/lora_B/MatMul", "table/lora/Add"],
    ),
    "experts": (Experts, torch.randn(2, 3, 4), ["up_proj"], False, ["up_proj/lora/Einsum"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_nodes_are_called_after_their_module_and_factor(case: str, tmp_path: Path) -> None:
    make, x, slots, vectors, wanted = CASES[case]
    to_onnx(
        trace(make().eval(), (x,)), tmp_path / "m.onnx", adapters="input", slots=slots,
        vectors=vectors, verify=False,
    )  # fmt: skip
    graph = onnx.load(tmp_path / "m.onnx").graph
    names = [node.name for node in graph.node]
    assert set(wanted) <= set(names)
    assert len(set(names)) == len(names)
    others = [n for n in names if "lora" in n and not n.startswith(f"{slots[0]}/")]
    assert others == []
    for node in graph.node:  # an activation is no part of a branch
        assert node.op_type not in ("Tanh", "Sigmoid", "Softmax") or "lora" not in node.name
        if node.op_type == "Constant":
            assert [attribute.name for attribute in node.attribute] == ["value"]
