"""Slots in files that a tool has named, ordered, fused or stored otherwise."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from lora_fx.errors import ExportError
from lora_fx.export import Session, add_lora, merge_onnx
from lora_fx.numerics import compare
from lora_fx.testing import make_adapter

ROWS, IMAGES = torch.randn(4, 6, 3), torch.randn(2, 4, 8, 8)


def as_constants(file: onnx.ModelProto) -> None:
    """Weights as nodes, behind what reads them."""
    file.graph.node.extend(
        onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
        for tensor in file.graph.initializer
    )
    del file.graph.initializer[:]


def halved(file: onnx.ModelProto) -> None:
    """Weights in float16, behind a Transpose of them and a Cast that stand in the end."""
    h = onnx.helper
    for tensor in file.graph.initializer:
        half = numpy_helper.to_array(tensor).astype(np.float16).T
        name, turned = f"{tensor.name}.half", f"{tensor.name}.turned"
        cast = h.make_node("Cast", [turned], [tensor.name], to=1)
        file.graph.node.extend([h.make_node("Transpose", [name], [turned]), cast])
        told = h.make_tensor_value_info(turned, onnx.TensorProto.FLOAT16, half.T.shape)
        file.graph.value_info.append(told)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(half), name))


@pytest.mark.parametrize("change", [as_constants, halved])
def test_a_file_that_a_tool_left_out_of_order(
    torch_file: Any,
    with_adapter: Any,
    eager: Any,
    change: Callable[[onnx.ModelProto], None],
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 5)), torch.randn(4, 12)
    model.half().float()
    file = onnx.load(torch_file(model, x, tmp_path / "base.onnx"))
    change(file)
    onnx.save(file, tmp_path / "base.onnx")
    with pytest.raises(onnx.checker.ValidationError, match="topologically sorted"):
        onnx.checker.check_model(str(tmp_path / "base.onnx"))
    adapter = make_adapter({"0": (30, 12), "2": (5, 30)}, scale=0.3)
    alone, adapted = with_adapter(tmp_path / "base.onnx", adapter, x, tmp_path)
    merge_onnx(tmp_path / "slots.onnx", adapter, tmp_path / "merged.onnx")
    wanted_alone, wanted = eager(model, adapter, x)
    assert compare(alone, wanted_alone).ok
    assert compare(adapted, wanted).ok
    dtype = torch.float16 if change is halved else torch.float32
    assert compare(Session(tmp_path / "merged.onnx").run({"x": x})["y"], wanted, dtype).ok
    assert compare(adapted, wanted_alone).relative > 1e-2


class Simplified(nn.Module):
    """A norm by its root mean square, written out."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize("norm", [nn.LayerNorm(5), Simplified(5)])
def test_a_norm_that_onnxruntime_fused_in_the_domain_of_onnx(
    with_adapter: Any, eager: Any, norm: nn.Module, tmp_path: Path
) -> None:
    """onnx knows no LayerNormalization before opset 17, and the simplified one never."""
    torch.manual_seed(0)
    model, kept = nn.Sequential(nn.Linear(3, 5), norm, nn.Linear(5, 7)).eval(), tmp_path / "kept"
    adapter = make_adapter({"0": (5, 3), "2": (7, 5)}, scale=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (ROWS,), str(kept), dynamo=False, opset_version=13,
            input_names=["x"], output_names=["y"],
        )  # fmt: skip
    base, options = tmp_path / "base.onnx", ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(base)
    ort.InferenceSession(str(kept), options)
    fused = [n for n in onnx.load(base).graph.node if n.op_type.endswith("LayerNormalization")]
    assert [n.domain for n in fused] == [""]
    with pytest.raises(onnx.checker.ValidationError, match="No Op registered"):
        onnx.checker.check_model(str(base))
    nodes = [n for n in onnx.load(base).graph.node if n.op_type in ("MatMul", "Gemm")]
    names = dict(zip([n.input[1] for n in nodes], adapter.updates, strict=True))
    alone, adapted = with_adapter(base, adapter, ROWS, tmp_path, external_data_above=0, names=names)
    wanted_alone, wanted = eager(model, adapter, ROWS)
    assert compare(alone, wanted_alone).ok
    assert compare(adapted, wanted).ok
    assert compare(adapted, wanted_alone).relative > 1e-2
    assert not list(tmp_path.glob("tmp*"))


def halves() -> dict[str, np.ndarray[Any, Any]]:
    """Weights (in, out) of a layer with one input and of a square one, in whole halves."""
    source = np.random.default_rng(0)
    shapes = {"fc.weight": (1, 7), "head.weight": (7, 7)}
    return {n: source.integers(-3, 4, s).astype(np.float32) / 2 for n, s in shapes.items()}


def in_order(second: onnx.NodeProto | None = None, **held: Any) -> onnx.ModelProto:
    """Two products without names and a function between them."""
    h, tensors = onnx.helper, halves() | held
    nodes = [
        h.make_node("MatMul", ["x", "fc.weight"], ["h"]),
        h.make_node("Tanh", ["h"], ["t"]),
        second or h.make_node("MatMul", ["t", "head.weight"], ["y"]),
    ]
    x, y = (h.make_tensor_value_info(n, 1, ["n", s]) for n, s in (("x", 1), ("y", 7)))
    stored = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    graph = h.make_graph(nodes, "g", [x], [y], stored)
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)


def called_as_what_is_put_in(file: onnx.ModelProto) -> None:
    for node in file.graph.node:
        for names in (node.input, node.output):
            new = {"h": "y_base", "t": "fc/lora/Add_output"}
            names[:] = [new.get(name, name) for name in names]


def of_the_third_version(file: onnx.ModelProto) -> None:
    """Before the fourth, all initializers are inputs."""
    file.ir_version, file.opset_import[0].version = 3, 8
    for tensor in file.graph.initializer:
        info = onnx.helper.make_tensor_value_info(tensor.name, 1, tensor.dims)
        file.graph.input.append(info)


def of_no_shape(file: onnx.ModelProto) -> None:
    file.graph.output[0].type.tensor_type.ClearField("shape")


def turned_by_nothing(file: onnx.ModelProto) -> None:
    turn = onnx.helper.make_node("Transpose", ["head.weight"], ["w"], perm=[0, 1])
    file.graph.node[2].input[1] = "w"
    file.graph.node.insert(0, turn)


def dequantised(file: onnx.ModelProto) -> None:
    for tensor in list(file.graph.initializer):
        name, array = tensor.name, numpy_helper.to_array(tensor)
        given = [f"{name}_quantized", f"{name}.scale"]
        steps = np.full(len(array), 0.5, np.float32)
        file.graph.initializer.append(numpy_helper.from_array(steps, given[1]))
        whole = numpy_helper.from_array((array * 2).astype(np.int8), given[0])
        tensor.CopyFrom(whole)
        node = onnx.helper.make_node("DequantizeLinear", given, [name], axis=0)
        file.graph.node.insert(0, node)


def test_a_convolution_whose_kernel_is_dequantised(
    torch_file: Any, with_adapter: Any, eager: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Tanh())
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_((tensor * 20).round() / 2)
    base = torch_file(model, IMAGES, tmp_path / "base.onnx")
    file = onnx.load(base)
    dequantised(file)
    onnx.save(file, base)
    adapter = make_adapter({"0": (6, 4, 3, 3)}, scale=0.2)
    alone, adapted = with_adapter(base, adapter, IMAGES, tmp_path, slots=["*"])
    wanted_alone, wanted = eager(copy.deepcopy(model), adapter, IMAGES)
    assert compare(alone, wanted_alone).ok
    assert compare(adapted, wanted).ok
    assert compare(alone, wanted).relative > 1e-2


@pytest.mark.parametrize(
    "change",
    [
        called_as_what_is_put_in,
        of_the_third_version,
        of_no_shape,
        turned_by_nothing,
        dequantised,
    ],
)
def test_a_file_that_names_and_stores_otherwise(
    with_adapter: Any, change: Callable[[onnx.ModelProto], None], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    file, x = in_order(), torch.randn(4, 1)
    change(file)
    onnx.save(file, tmp_path / "base.onnx")
    adapter = make_adapter({"fc": (7, 1), "head": (7, 7)}, scale=0.3)
    alone, adapted = with_adapter(tmp_path / "base.onnx", adapter, x, tmp_path)
    updates: Any = adapter.updates
    base = wanted = x
    for name, path in (("fc.weight", "fc"), ("head.weight", "head")):
        own = torch.from_numpy(halves()[name])
        base, wanted = base @ own, wanted @ (own + updates[path].delta().T)
        if path == "fc":
            base, wanted = torch.tanh(base), torch.tanh(wanted)
    assert compare(alone, base).ok
    assert compare(adapted, wanted).ok
    assert compare(adapted, base).relative > 1e-2


def test_one_weight_read_both_ways_is_two_layers(tmp_path: Path) -> None:
    """A square one has one shape for both, and an adapter of one is none of the other."""
    square = np.random.default_rng(0).standard_normal((7, 7)).astype(np.float32)
    node = onnx.helper.make_node("Gemm", ["t", "fc.weight"], ["y"], name="back", transB=1)
    file = in_order(node, **{"fc.weight": square})
    file.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 7
    onnx.save(file, tmp_path / "base.onnx")
    with pytest.raises(ExportError, match=r"fc: two layers of one name.*names="):
        add_lora(tmp_path / "base.onnx", tmp_path / "slots.onnx")
    report = add_lora(tmp_path / "base.onnx", tmp_path / "slots.onnx", names={"back": "back"})
    assert report.slots == ["fc", "back"]


def test_tables_of_one_scope_are_in_the_way_of_no_other_layer(tmp_path: Path) -> None:
    """As TorchScript's exporter calls lookups in parameters that no module holds alone."""
    h, sides = onnx.helper, ("width", "height")
    source = np.random.default_rng(0)
    tables = {f"attn.{n}": source.standard_normal((5, 7)).astype(np.float32) for n in sides}
    file = in_order(**tables)
    file.graph.input.append(h.make_tensor_value_info("ids", onnx.TensorProto.INT64, [3]))
    for place, side in enumerate(sides):
        node = h.make_node("Gather", [f"attn.{side}", "ids"], [side], name=f"/attn/Gather_{place}")
        file.graph.node.append(node)
        file.graph.output.append(h.make_tensor_value_info(side, 1, [3, 7]))
    onnx.save(file, tmp_path / "base.onnx")
    names = {"attn.width": "attn", "attn.height": "attn"}
    report = add_lora(tmp_path / "base.onnx", tmp_path / "slots.onnx", names=names)
    assert report.slots == ["fc", "head"]
    with pytest.raises(ExportError, match=r"attn: two layers of one name.*height.*names="):
        add_lora(tmp_path / "base.onnx", tmp_path / "other.onnx", slots="*", names=names)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"inputs": {"z": ROWS}}, "missing inputs: x; unknown inputs: z; the model takes x"),
        ({"slots": []}, "slots: names no layer; there are fc, head"),
        ({"slots": 3}, "slots: 3 is no name or list of names of layers"),
        ({"names": {"fc.weight": ""}}, "names: '' is no module path: give one"),
        ({"names": {"fc.weight": "a\nb"}}, r"names: 'a\\nb' is no module path: give one"),
        ({"names": {"fc.weight": 3}}, "names: 3 is no module path: give one"),
        ({"slots": [3]}, r"slots: \[3\] is no name or list of names of layers"),
    ],
)
def test_what_a_file_has_not_is_said(options: Any, said: str, tmp_path: Path) -> None:
    onnx.save(in_order(), tmp_path / "base.onnx")
    with pytest.raises(ExportError, match=said):
        add_lora(tmp_path / "base.onnx", tmp_path / "slots.onnx", **options)
    assert not (tmp_path / "slots.onnx").exists()


def test_a_file_that_is_not_valid_itself_is_thought_of(tmp_path: Path) -> None:
    """As torch.onnx writes it where it fails to convert to the version that was asked for."""
    h, floats = onnx.helper, onnx.TensorProto.FLOAT
    weight = numpy_helper.from_array(np.ones((3, 5), np.float32), "fc.weight")
    nodes = [h.make_node("MatMul", ["x", "fc.weight"], ["h"]), h.make_node("Gelu", ["h"], ["y"])]
    x, y = (h.make_tensor_value_info(n, floats, ["b", s]) for n, s in (("x", 3), ("y", 5)))
    graph = h.make_graph(nodes, "g", [x], [y], [weight])
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 18)]), tmp_path / "base.onnx")
    with pytest.raises(ExportError, match=r"Gelu.*if a file that it was made of is not either"):
        add_lora(tmp_path / "base.onnx", tmp_path / "slots.onnx")
