"""Slots of layers in graphs made by hand: in branches and functions, in nodes, called otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from lora_fx.errors import ExportError
from lora_fx.export import Session, add_lora, export_adapter, merge_onnx, quantize_onnx
from lora_fx.numerics import compare
from lora_fx.testing import make_adapter

ROWS, IMAGES = torch.randn(4, 6, 3), torch.randn(2, 4, 8, 8)


def test_a_weight_of_a_few_numbers_in_a_node_is_one(with_adapter: Any, tmp_path: Path) -> None:
    h, weight = onnx.helper, np.arange(6, dtype=np.float32).reshape(3, 2)
    held = numpy_helper.from_array(weight, "fc.weight")
    nodes = [
        h.make_node("Constant", [], ["fc.weight"], value=held),
        h.make_node("MatMul", ["x", "fc.weight"], ["y"]),
    ]
    x, y = (h.make_tensor_value_info(n, 1, ["n", s]) for n, s in (("x", 3), ("y", 2)))
    graph = h.make_graph(nodes, "g", [x], [y])
    onnx.save(h.make_model(graph, opset_imports=own_opsets(), ir_version=10), tmp_path / "b.onnx")
    adapter, rows = make_adapter({"fc": (2, 3)}, scale=0.3), torch.eye(3)
    _, adapted = with_adapter(tmp_path / "b.onnx", adapter, rows, tmp_path)
    update: Any = adapter.updates["fc"]
    assert compare(adapted, torch.from_numpy(weight) + update.delta().T).ok
    assert not compare(adapted, torch.from_numpy(weight) + 0.9 * update.delta().T).ok


@pytest.mark.parametrize("beside", ["fc.bias", "fc.weight_g_idx"])
def test_a_layer_in_few_bits_with_a_bias_or_an_order_of_its_own_takes_slots(
    with_adapter: Any, beside: str, tmp_path: Path
) -> None:
    """As onnxruntime's optimiser fuses it; as GPTQ orders rows, which is not told as numbers."""
    numbers, h = np.random.default_rng(0), onnx.helper
    held = {
        "fc.weight_Q4": numbers.integers(0, 256, (16, 4, 8), np.uint8),
        "fc.weight_scales": numbers.random((16, 4), np.float32) / 8,
    }
    has_bias = beside == "fc.bias"
    held[beside] = numbers.random(16, np.float32) if has_bias else np.arange(64, dtype=np.int32) % 4
    given = ["x", *list(held)[:2], "", *([""] if has_bias else []), beside]
    sizes = {"K": 64, "N": 16, "bits": 4, "block_size": 16}
    node = h.make_node("MatMulNBits", given, ["y"], "node", domain="com.microsoft", **sizes)
    x, y = (h.make_tensor_value_info(n, 1, ["n", s]) for n, s in (("x", 64), ("y", 16)))
    stored = [numpy_helper.from_array(value, name) for name, value in held.items()]
    graph = h.make_graph([node], "g", [x], [y], stored)
    model = h.make_model(graph, opset_imports=own_opsets(), ir_version=10)
    onnx.save(model, str(tmp_path / "base.onnx"))
    adapter, rows = make_adapter({"fc": (16, 64)}, scale=0.2), torch.eye(64)
    alone, adapted = with_adapter(tmp_path / "base.onnx", adapter, rows, tmp_path)
    update: Any = adapter.updates["fc"]
    assert compare(adapted, torch.from_numpy(alone) + update.delta().T).ok
    assert not compare(adapted, torch.from_numpy(alone) + 0.9 * update.delta().T).ok


def calls_elsewhere(how: str, weight: np.ndarray[Any, Any], path: Path) -> Path:
    """A layer called once as a product, and once more in another way; the sum of both."""
    h = onnx.helper
    held, functions = [numpy_helper.from_array(weight, "fc.weight")], []
    own = h.make_node("MatMul", ["x", "fc.weight"], ["one"])
    other = h.make_node("MatMul", ["x", "fc.weight"], ["two"])
    total = h.make_node("Add", ["one", "two"], ["y"])
    x, y = (h.make_tensor_value_info(n, 1, ["n", s]) for n, s in (("x", 3), ("y", 5)))
    if how == "in a branch":
        then = h.make_graph([other], "then", [], [h.make_tensor_value_info("two", 1, None)])
        held.append(numpy_helper.from_array(np.array(True), "is_so"))
        middle = [h.make_node("If", ["is_so"], ["two"], then_branch=then, else_branch=then)]
    elif how == "in a function":
        body = h.make_node("MatMul", ["a", "w"], ["b"])
        functions = [h.make_function("f", "Fc", ["a", "w"], ["b"], [body], own_opsets())]
        middle = [h.make_node("Fc", ["x", "fc.weight"], ["two"], domain="f")]
    elif how == "fused":
        other.op_type, other.domain = "FusedMatMul", "com.microsoft"
        middle = [other]
    else:  # as attention is fused: [q | k | v]
        packed = np.concatenate([weight + 1, weight], axis=1)
        held.append(numpy_helper.from_array(packed, "packed"))
        held.append(numpy_helper.from_array(np.array([5, 5]), "sizes"))
        product = h.make_node("FusedMatMul", ["x", "packed"], ["both"], domain="com.microsoft")
        parts = h.make_node("Split", ["both", "sizes"], ["zero", "two"], axis=1)
        middle = [product, parts]
    graph = h.make_graph([own, *middle, total], "g", [x], [y], held)
    kept = {"opset_imports": own_opsets(), "ir_version": 10, "functions": functions}
    onnx.save(h.make_model(graph, **kept), str(path))
    return path


def test_a_lookup_in_the_numbers_of_a_layer_is_another_layer_in_whatever_axes(
    tmp_path: Path,
) -> None:
    """A head in few bits is looked up as (rows, blocks * bytes), and multiplied with in blocks."""
    weight, h = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32), onnx.helper
    held = {"fc.weight": weight, "sizes": np.array([-1]), "ids": np.array([2])}
    nodes = [
        h.make_node("MatMul", ["x", "fc.weight"], ["one"]),
        h.make_node("Reshape", ["fc.weight", "sizes"], ["flat"]),
        h.make_node("Gather", ["flat", "ids"], ["two"]),
        h.make_node("Add", ["one", "two"], ["y"]),
    ]
    x, y = (h.make_tensor_value_info(n, 1, ["n", s]) for n, s in (("x", 3), ("y", 5)))
    stored = [numpy_helper.from_array(value, name) for name, value in held.items()]
    graph = h.make_graph(nodes, "g", [x], [y], stored)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(tmp_path / "base.onnx"))
    assert add_lora(tmp_path / "base.onnx", tmp_path / "slots.onnx").slots == ["fc"]


def own_opsets() -> list[onnx.OperatorSetIdProto]:
    pairs = ("", 20), ("com.microsoft", 1), ("f", 1)
    return [onnx.helper.make_opsetid(domain, version) for domain, version in pairs]


@pytest.mark.parametrize("how", ["in a branch", "in a function"])
def test_a_layer_in_a_branch_or_a_function_takes_the_adapter_too(
    with_adapter: Any, how: str, tmp_path: Path
) -> None:
    weight, x = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32), ROWS[0]
    base = calls_elsewhere(how, weight, tmp_path / "base.onnx")
    adapter = make_adapter({"fc": (5, 3)}, scale=0.3)
    alone, adapted = with_adapter(base, adapter, x, tmp_path)
    merge_onnx(tmp_path / "slots.onnx", adapter, tmp_path / "merged.onnx")
    update: Any = adapter.updates["fc"]
    own = torch.from_numpy(weight)
    assert compare(alone, 2 * x @ own).ok
    wanted = 2 * x @ (own + update.delta().T)
    for found in (adapted, Session(tmp_path / "merged.onnx").run({"x": x})["y"]):
        assert compare(found, wanted).ok
        assert compare(found, wanted - x @ update.delta().T).relative > 1e-2


def test_a_layer_in_few_bits_in_two_branches_takes_the_adapter_in_both(tmp_path: Path) -> None:
    """As optimum merges a decoder with its first step: values of the branches bear one name."""
    weight = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32) / 4
    h, adapter = onnx.helper, make_adapter({"fc": (16, 32)}, scale=0.3)
    branches = {}
    for branch, after in (("then_branch", "Tanh"), ("else_branch", "Sin")):
        product = h.make_node("MatMul", ["x", "fc.weight"], ["h"], name="/fc/MatMul")
        given = h.make_tensor_value_info("out", 1, None)
        nodes = [product, h.make_node(after, ["h"], ["out"])]
        branches[branch] = h.make_graph(nodes, branch, [], [given])
    x, y = (h.make_tensor_value_info(n, 1, ["n", s]) for n, s in (("x", 32), ("y", 16)))
    which = h.make_tensor_value_info("which", onnx.TensorProto.BOOL, [])
    choice = h.make_node("If", ["which"], ["y"], **branches)
    held = [numpy_helper.from_array(weight, "fc.weight")]
    graph = h.make_graph([choice], "g", [x, which], [y], held)
    model = h.make_model(graph, opset_imports=own_opsets(), ir_version=10)
    onnx.save(model, str(tmp_path / "plain.onnx"))
    quantize_onnx(tmp_path / "plain.onnx", tmp_path / "base.onnx", layers=["fc"])
    assert add_lora(tmp_path / "base.onnx", tmp_path / "slots.onnx").verified
    export_adapter(adapter, tmp_path / "slots.onnx", tmp_path / "a.onnx_adapter")
    slots, base = Session(tmp_path / "slots.onnx"), Session(tmp_path / "base.onnx")
    fed = [{"x": torch.eye(32), "which": np.array(is_first)} for is_first in (True, False)]
    numbers = torch.atanh(torch.from_numpy(base.run(fed[0])["y"]))  # that the bits stand for
    update: Any = adapter.updates["fc"]
    for given, after in zip(fed, (torch.tanh, torch.sin), strict=True):
        found = slots.run(given, tmp_path / "a.onnx_adapter")["y"]
        assert compare(found, after(numbers + update.delta().T)).ok
        assert not compare(found, after(numbers + 0.9 * update.delta().T)).ok


@pytest.mark.parametrize("how", ["fused", "packed with others"])
def test_a_layer_that_is_called_where_no_slot_stands_is_refused(
    with_adapter: Any, how: str, tmp_path: Path
) -> None:
    """Taken as it is, an adapter acts on half of the calls."""
    weight, x = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32), ROWS[0]
    base = calls_elsewhere(how, weight, tmp_path / "base.onnx")
    with pytest.raises(ExportError, match=r"fc \(by .*\): called once more where no slot can"):
        add_lora(base, tmp_path / "slots.onnx")
    assert not (tmp_path / "slots.onnx").exists()
    adapter = make_adapter({"fc": (5, 3)}, scale=0.3)
    _, half = with_adapter(base, adapter, x, tmp_path, names={"fc.weight": "fc"})
    update: Any = adapter.updates["fc"]
    own = torch.from_numpy(weight)
    assert compare(half, x @ own + x @ (own + update.delta().T)).ok
    assert not compare(half, 2 * x @ (own + update.delta().T)).ok
