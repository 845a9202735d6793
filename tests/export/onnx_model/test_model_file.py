from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from lora_fx.errors import ExportError
from lora_fx.export.onnx_model.model_file import load_proto, manifest_in, write_model


def test_a_graph_that_is_not_valid_onnx_is_refused(exported_mlp: Any, tmp_path: Path) -> None:
    model = ir.load(exported_mlp.path("constant"))
    write_model(model, tmp_path / "good.onnx", external_data_above=10**9)
    for node in model.graph:
        node.op_type = node.op_type.replace("Relu", "Rellu")
    with pytest.raises(ExportError, match=r"not valid ONNX: .*Rellu"):
        write_model(model, tmp_path / "bad.onnx", external_data_above=10**9)


def test_a_written_file_says_whether_it_has_slots(exported_mlp: Any) -> None:
    found = manifest_in(load_proto(exported_mlp.path("input")), Path("x"))
    assert found is not None
    assert [slot.path for slot in found.slots] == ["up", "tail.1"]
    assert manifest_in(load_proto(exported_mlp.path("folded")), Path("x")) is None


@pytest.mark.parametrize("form", ["constant", "folded", "input"])
def test_what_is_said_of_a_weight_the_weight_says(exported_mlp: Any, form: str) -> None:
    graph = load_proto(exported_mlp.path(form)).graph
    described = {info.name for info in graph.value_info}
    assert not described & {tensor.name for tensor in graph.initializer}
    assert described  # what nodes give is still described


@pytest.mark.parametrize("end", ["onnxtxt", "textproto", "json", "ort"])
def test_another_form_of_a_model_is_refused_with_what_makes_a_file_of_it(
    tmp_path: Path, end: str
) -> None:
    path = tmp_path / f"model.{end}"
    path.write_text("<ir_version: 10>")
    wanted = r"own format.*give the \.onnx file" if end == "ort" else r"as text.*onnx\.save"
    with pytest.raises(ExportError, match=wanted):
        load_proto(path)


@pytest.mark.parametrize(
    "content", [b"", b"no model", onnx.ModelProto(ir_version=9).SerializeToString()]
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(ExportError, match=r"x\.onnx: not an ONNX file"):
        load_proto(tmp_path / "x.onnx")
    with pytest.raises(ExportError, match=r"Is a directory, expected a file: give .*/x\.onnx$"):
        load_proto(tmp_path)
