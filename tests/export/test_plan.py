from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

from lora_fx.export.inputs import example_inputs
from lora_fx.export.plan import Constant, Swappable
from lora_fx.export.trial import Trial, trial_of
from lora_fx.passes import InjectLora
from lora_fx.text import text


def trial(plan: Constant | Swappable, gm: Any) -> Trial:
    return trial_of(plan.traced, example_inputs(gm, None, None, None))


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
