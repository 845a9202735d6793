from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import fx, nn

from lora_fx.errors import ExportError, VerificationError
from lora_fx.export import to_onnx, verify_onnx
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


def rewritten(path: Path, out: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    """Another tool's file: it has no digests, and something else in it."""
    model = onnx.load(path)
    del model.metadata_props[:]
    change(model)
    onnx.save(model, out)
    return out


def scaled_by(factor: float) -> Callable[[onnx.ModelProto], object]:
    def change(model: onnx.ModelProto) -> None:
        weight = next(t for t in model.graph.initializer if len(t.dims) == 2)
        values = numpy_helper.to_array(weight) * np.float32(factor)
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))

    return change


def as_double(model: onnx.ModelProto) -> None:
    """Gives the output in a wider type, with the very numbers."""
    output = model.graph.output[0]
    for node in model.graph.node:
        node.output[:] = ["narrow" if name == output.name else name for name in node.output]
        node.input[:] = ["narrow" if name == output.name else name for name in node.input]
    model.graph.node.add(op_type="Cast", input=["narrow"], output=[output.name]).attribute.add(
        name="to", type=2, i=onnx.TensorProto.DOUBLE
    )
    output.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[fx.GraphModule, Path]:
    """A model of two layers; that before the norm may be scaled as one likes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.LayerNorm(5, eps=1e-9), nn.Linear(5, 4))
    gm = trace(model.eval(), (torch.randn(2, 7, 3),))
    path = tmp_path_factory.mktemp("plain") / "model.onnx"
    to_onnx(gm, path, verify=False)
    return gm, path


def test_a_control_is_what_eager_can_tell(plain: tuple[fx.GraphModule, Path]) -> None:
    gm, path = plain
    report = verify_onnx(gm, path)
    assert report.verified
    assert [row.what for row in report.controls] == ["control: 2.weight x 1.1"] * len(
        report.controls
    )


@pytest.mark.parametrize("change", [scaled_by(1 + 5e-4), as_double], ids=["numbers", "type"])
def test_numbers_and_types_are_held_to_the_model_s_own(
    plain: tuple[fx.GraphModule, Path],
    change: Callable[[onnx.ModelProto], object],
    tmp_path: Path,
) -> None:
    gm, path = plain

    def last(model: onnx.ModelProto) -> None:
        """Of the last layer, for the norm behind the first makes up for a scale."""
        model.graph.initializer.sort(key=lambda t: not t.name.startswith("2."))
        change(model)

    assert verify_onnx(gm, rewritten(path, tmp_path / "same.onnx", scaled_by(1.0))).verified
    with pytest.raises(VerificationError, match="disagree with eager"):
        verify_onnx(gm, rewritten(path, tmp_path / "other.onnx", last))
