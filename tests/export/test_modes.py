from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from lora_fx import Adapter, Update, compare, fold, inject, trace
from lora_fx.errors import ExportError
from lora_fx.export import Session, export_adapter, to_onnx
from lora_fx.export.modes import Constant, Swappable
from lora_fx.export.program.example_inputs import example_inputs
from lora_fx.export.program.export_unit import ExportUnit, export_unit
from lora_fx.graph.printer import text
from lora_fx.injection.branches import branches
from lora_fx.passes import InjectLora
from lora_fx.testing import Notebook, make_adapter, traced

X = torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(1))


def trial(plan: Constant | Swappable, gm: Any) -> ExportUnit:
    return export_unit(plan.traced, example_inputs(gm, None, None, None))


def test_a_swappable_plan_takes_the_adapters_out_and_probes_the_slots(mlp: Any) -> None:
    gm = InjectLora(mlp.adapter(2))(mlp.gm).graph_module
    plan = Swappable.of(gm, ["up"])
    assert text(plan.base) == text(mlp.gm)
    assert "up.lora_A.probe" in text(plan.traced)
    assert [slot.path for slot in plan.slots] == ["up"]


@pytest.mark.parametrize("tensor", ["up.weight", "tail.1.weight"])
def test_a_swappable_file_with_another_weight_fails_alone_and_adapted(
    exported_mlp: Any, tmp_path: Path, tensor: str
) -> None:
    gm = exported_mlp.sample.gm
    plan = Swappable.of(gm, None)
    assert all(row.ok for row in plan.verify(exported_mlp.path("input"), trial(plan, gm)).checks)
    proto = onnx.load(exported_mlp.path("input"))
    stored = next(t for t in proto.graph.initializer if t.name == tensor)
    stored.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored) * 1.1, tensor))
    onnx.save(proto, tmp_path / "spoilt.onnx")
    rows = plan.verify(tmp_path / "spoilt.onnx", trial(plan, gm)).checks
    wrong = {(row.what, row.output) for row in rows if not row.ok}
    assert {("base", "score"), ("adapted", "score")} <= wrong


def test_a_low_rank_product_is_exported_in_its_cheapest_form_however_it_was_spelled(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    gm = traced(Notebook(3, 5), torch.randn(4, 7, 3), dynamic_shapes=({0: "batch"},))
    plan = Constant.of(gm)
    assert "matmul(x, fc.lora_shrink)" in text(plan.traced)
    assert text(plan.expected) == text(gm)
    report = to_onnx(gm, tmp_path / "model.onnx")
    assert all(row.ok for row in report.checks)
    operators = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert operators == ["MatMul", "Concat", "MatMul", "Add"] or operators.count("MatMul") == 2


def test_a_constant_plan_is_judged_by_the_graph_as_it_was_given(mlp: Any) -> None:
    gm = InjectLora(mlp.adapter(2))(mlp.gm).graph_module
    plan = Constant.of(gm)
    assert branches(plan.traced) == []
    assert text(plan.expected) == text(gm)
    base = Constant.of(mlp.gm)
    assert text(base.traced) == text(base.expected) == text(mlp.gm)


def test_an_adapter_of_the_name_that_is_given_to_what_is_read_out() -> None:
    torch.manual_seed(0)
    gm = traced(Notebook(3, 5), torch.randn(4, 7, 3))
    update = Update(torch.randn(2, 3), torch.randn(5, 2), 1.0)
    both = InjectLora(Adapter("raised", {"fc": update}))(gm).graph_module
    plan = Constant.of(both)
    assert compare(plan.traced(X), both(X)).relative <= 1e-5
    assert compare(plan.traced(X), gm(X)).relative > 1e-2


def test_slots_of_many_rows_make_their_weight_and_take_any_rank(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 512, 64)
    gm = traced(nn.Sequential(nn.Linear(64, 48)), x)
    plan = Swappable.of(gm, None)
    assert "add(0.weight" in text(plan.traced)
    report = to_onnx(gm, tmp_path / "model.onnx", adapters="input")
    assert all(row.ok for row in report.checks)
    adapter = make_adapter({"0": (48, 64)}, rank=5)
    export_adapter(adapter, tmp_path / "model.onnx", tmp_path / "five.onnx_adapter")
    session = Session(tmp_path / "model.onnx")
    (name,) = session.inputs
    (found,) = session.run({name: x}, adapter=tmp_path / "five.onnx_adapter").values()
    expected = InjectLora(adapter)(gm).graph_module(x)
    assert compare(torch.from_numpy(found), expected).relative <= 1e-5
    assert compare(torch.from_numpy(found), gm(x)).relative > 1e-2


class Recording(nn.Module):
    """Keeps in a buffer what one of its layers gives, which no output reads."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.seen = nn.Linear(6, 5), nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean.copy_(self.seen(x).detach().mean(0))
        return self.fc(x)


def test_a_layer_that_a_buffer_alone_reads_is_none_of_a_file(tmp_path: Path) -> None:
    gm = trace(Recording().eval(), (torch.randn(3, 6),), dynamic_shapes=({0: "batch"},))
    both = inject(gm, make_adapter({"fc": (5, 6), "seen": (3, 6)}))
    place = tmp_path / "model.onnx"
    for graph in (both, fold(both)):
        report = to_onnx(graph, place, force=True)
        assert report.verified
        x = torch.randn(4, 6)
        [found] = Session(place).run({"x": x}).values()
        assert compare(found, both(x)).ok
        assert not compare(found, gm(x)).ok, "the control"
    assert to_onnx(gm, place, adapters="input", slots="all-linear", force=True).slots == ["fc"]
    with pytest.raises(ExportError, match=r"no output .* depends on seen, .*: leave it out"):
        to_onnx(both, place, adapters="input", force=True)
