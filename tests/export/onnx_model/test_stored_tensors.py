"""What a model file holds: each tensor by name, read when asked for, of a file as exported."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import helper
from torch import nn

import lora_fx
from lora_fx.errors import ExportError
from lora_fx.export import to_onnx
from lora_fx.export.onnx_model.stored_tensors import tensors_in
from lora_fx.report.diff import diff


@pytest.mark.parametrize("beside", [0, 128_000_000])
def test_tensors_and_calls_of_a_file(beside: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 128), nn.Tanh(), nn.Linear(128, 4)).eval()
    gm = lora_fx.trace(model, (torch.randn(2, 3),))
    to_onnx(gm, tmp_path / "model.onnx", external_data_above=beside, verify=False)
    held = tensors_in(tmp_path / "model.onnx")
    weight = held.tensors["0.weight"]()
    assert torch.equal(weight, model[0].weight.detach().t()) or torch.equal(
        weight, model[0].weight.detach()
    )
    assert held.calls["Tanh"] == 1


def test_a_file_that_was_changed_since_is_refused(tmp_path: Path) -> None:
    gm = lora_fx.trace(nn.Linear(3, 5).eval(), (torch.randn(2, 3),))
    to_onnx(gm, tmp_path / "model.onnx", verify=False)
    proto = onnx.load(tmp_path / "model.onnx")
    data = bytearray(proto.graph.initializer[0].raw_data)
    data[0] ^= 1
    proto.graph.initializer[0].raw_data = bytes(data)
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=r"model\.onnx"):
        tensors_in(tmp_path / "model.onnx")


TYPES = {
    "INT4": [-8, 7, 1], "UINT4": [15, 0, 1], "FLOAT8E4M3FN": [0.5, -2, 448],
    "FLOAT8E5M2": [0.5, -2, 1], "FLOAT4E2M1": [0.5, -6, 1], "BFLOAT16": [0.5, -2, 1],
}  # fmt: skip


def holding(path: Path, tensor: onnx.TensorProto) -> Path:
    """A file that gives one tensor."""
    y = helper.make_tensor_value_info("y", tensor.data_type, [*tensor.dims])
    nodes = [helper.make_node("Identity", ["w"], ["y"])]
    graph = helper.make_graph(nodes, "g", [], [y], initializer=[tensor])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), path)
    return path


@pytest.mark.parametrize("kind", TYPES)
def test_numbers_of_any_type_are_told_apart(kind: str, tmp_path: Path) -> None:
    values, other = TYPES[kind], [*TYPES[kind][:2], 0]
    one, two = (
        holding(
            tmp_path / f"{v[2]}.onnx",
            helper.make_tensor("w", onnx.TensorProto.DataType.Value(kind), [3], v),
        )
        for v in (values, other)
    )
    assert tensors_in(one).tensors["w"]().double().tolist() == values
    assert not diff(one, one).rows
    assert [row.path for row in diff(one, two).rows] == ["w"]


def test_texts_are_told_apart(tmp_path: Path) -> None:
    files = [
        holding(
            tmp_path / f"{n}.onnx", helper.make_tensor("w", onnx.TensorProto.STRING, [2], words)
        )
        for n, words in enumerate(([b"a", b"\xff"], [b"a", b"b"]))
    ]
    assert not diff(files[0], files[0]).rows
    assert [row.path for row in diff(*files).rows] == ["w"]
