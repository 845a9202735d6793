from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lora_fx.errors import ExportError, VerificationError
from lora_fx.export import verify_onnx
from lora_fx.frontend.trace import trace


def test_a_constant_file_must_hold_the_sum_of_the_adapters(exported_mlp: Any) -> None:
    sample, path = exported_mlp.sample, exported_mlp.path("folded")
    before, stages = path.read_bytes(), []
    report = verify_onnx(
        sample.gm, path, adapters=[sample.adapter(2)], progress=lambda s: stages.append(s)
    )
    assert report.verified
    assert (report.mode, report.slots, stages) == ("merged", [], ["prepare", "verify"])
    assert path.read_bytes() == before
    for wrong in ((), [sample.adapter(3)], [sample.adapter(2), sample.adapter(3)]):
        with pytest.raises(VerificationError, match="disagree with eager"):
            verify_onnx(sample.gm, path, adapters=wrong)


def test_a_file_with_slots_is_run_alone_and_with_each_adapter(exported_mlp: Any) -> None:
    sample, path = exported_mlp.sample, exported_mlp.path("input")
    report = verify_onnx(sample.gm, path, adapters=[sample.adapter(2), sample.adapter(3)])
    assert report.verified
    assert (report.mode, report.slots) == ("swappable", ["up", "tail.1"])
    assert {row.what for row in report.checks} == {"base", "rank2", "rank3"}
    assert {row.what for row in verify_onnx(sample.gm, path).checks} == {"model"}


def test_a_file_with_other_inputs_is_refused(exported_mlp: Any) -> None:
    gm = trace(nn.Linear(3, 5).eval(), (torch.randn(2, 7, 3),))
    with pytest.raises(ExportError, match=r"has inputs x; the model .* has input: is it another"):
        verify_onnx(gm, exported_mlp.path("constant"))
