"""Graphs that onnxruntime takes, as tools leave them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from lora_fx.errors import ExportError
from lora_fx.export import Session, add_lora, export_adapter, merge_onnx, quantize_onnx
from lora_fx.numerics import compare
from lora_fx.testing import make_adapter

SOURCE = np.random.default_rng(0)
X, WEIGHT = (SOURCE.standard_normal(shape).astype(np.float32) for shape in ((4, 3), (3, 7)))


def plain() -> onnx.ModelProto:
    """``y = tanh(x) @ W``."""
    nodes = [
        helper.make_node("Tanh", ["x"], ["h"]),
        helper.make_node("MatMul", ["h", "fc.weight"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(n, 1, ["n", s]) for n, s in (("x", 3), ("y", 7)))
    stored = [numpy_helper.from_array(WEIGHT, "fc.weight")]
    graph = helper.make_graph(nodes, "g", [x], [y], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def in_words(model: onnx.ModelProto) -> None:
    """ONNX's own domain under its long name."""
    model.opset_import[0].domain = "ai.onnx"


def gives_its_input(model: onnx.ModelProto) -> None:
    """An output that is an input."""
    model.graph.output.append(model.graph.input[0])


def gives_twice(model: onnx.ModelProto) -> None:
    """Two outputs of one value."""
    model.graph.node.append(helper.make_node("Identity", ["y"], ["z"]))
    model.graph.output.append(helper.make_tensor_value_info("z", 1, ["n", 7]))


def gives_two_names(model: onnx.ModelProto) -> None:
    """Two outputs that hand on one value, which is none."""
    gives_twice(model)
    model.graph.node[1].output[0] = "k"
    model.graph.node[2].input[0] = "k"
    model.graph.node.append(helper.make_node("Identity", ["k"], ["y"]))


def of_any_rank(model: onnx.ModelProto) -> None:
    """An input whose number of axes is left open."""
    model.graph.input[0].type.tensor_type.ClearField("shape")
    model.graph.output[0].type.tensor_type.ClearField("shape")


def twice_by_a_function(model: onnx.ModelProto) -> None:
    """A function that holds its weight, called twice: ``y = (x W) + |(-x) W|``."""
    opsets = [helper.make_opsetid("", 20)]
    held = helper.make_node("Constant", [], ["fc.weight"], value=model.graph.initializer[0])
    body = [held, helper.make_node("MatMul", ["x", "fc.weight"], ["y"])]
    model.functions.append(helper.make_function("own", "Fc", ["x"], ["y"], body, opsets))
    model.opset_import.append(helper.make_opsetid("own", 1))
    nodes = [
        helper.make_node("Fc", ["x"], ["p"], domain="own"),
        helper.make_node("Neg", ["x"], ["m"]),
        helper.make_node("Fc", ["m"], ["q"], domain="own"),
        helper.make_node("Abs", ["q"], ["r"]),
        helper.make_node("Add", ["p", "r"], ["y"]),
    ]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)


def expected(change: Any, weight: Any) -> list[Any]:
    """What a changed graph gives, one after the other."""
    y = np.tanh(X) @ weight
    if change is twice_by_a_function:
        return [X @ weight + np.abs(-X @ weight)]
    more = {gives_its_input: [X], gives_twice: [y], gives_two_names: [y]}
    return [y, *more.get(change, [])]


@pytest.mark.parametrize(
    "change",
    [in_words, gives_its_input, gives_twice, gives_two_names, of_any_rank, twice_by_a_function],
)
def test_a_graph_that_onnxruntime_takes_is_taken(change: Any, tmp_path: Path) -> None:
    model, out, file = plain(), tmp_path / "slots.onnx", tmp_path / "a.onnx_adapter"
    change(model)
    onnx.save(model, tmp_path / "base.onnx")
    adapter = make_adapter({"fc": (7, 3)}, scale=0.3)
    inputs = {"x": X} if change is of_any_rank else None
    assert add_lora(tmp_path / "base.onnx", out, inputs=inputs).slots == ["fc"]
    export_adapter(adapter, out, file)
    report = merge_onnx(out, adapter, tmp_path / "merged.onnx", inputs=inputs)
    assert report.inputs == ["x"]
    assert report.outputs == [value.name for value in model.graph.output]
    update: Any = adapter.updates["fc"]
    wanted = expected(change, WEIGHT + update.delta().T.numpy())
    for found in (
        Session(out).run({"x": X}, file),
        Session(tmp_path / "merged.onnx").run({"x": X}),
    ):
        assert all(compare(*pair).ok for pair in zip(found.values(), wanted, strict=True))
        assert not compare(next(iter(found.values())), expected(change, WEIGHT)[0]).ok


def test_onnx_s_domain_may_be_spelled_out_where_bits_are_few(tmp_path: Path) -> None:
    """As everywhere else, and the report says the file's version of it."""
    model = plain()
    in_words(model)
    onnx.save(model, tmp_path / "base.onnx")
    report = quantize_onnx(tmp_path / "base.onnx", tmp_path / "q.onnx", bits=8, layers=["*"])
    assert (report.verified, report.opset) == (True, 20)


def test_a_weight_that_is_stored_sparse_is_refused_by_name(tmp_path: Path) -> None:
    model = plain()
    values = numpy_helper.from_array(WEIGHT.ravel()[:4], "fc.weight")
    places = numpy_helper.from_array(np.arange(4))
    del model.graph.initializer[:]
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [3, 7]))
    onnx.save(model, tmp_path / "base.onnx")
    with pytest.raises(ExportError, match=r"reads fc\.weight, which .* stored sparse is not read"):
        add_lora(tmp_path / "base.onnx", tmp_path / "slots.onnx")


def test_an_input_that_is_called_as_a_slot_is_told(tmp_path: Path) -> None:
    model = plain()
    model.graph.input[0].name = model.graph.node[0].input[0] = "fc.lora_A"
    onnx.save(model, tmp_path / "base.onnx")
    with pytest.raises(ExportError, match=r"values called fc\.lora_A already: names= gives"):
        add_lora(tmp_path / "base.onnx", tmp_path / "slots.onnx")
