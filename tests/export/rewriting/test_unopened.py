"""What takes no slot is named, and why; layers that the graph nests or reads constants are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from lora_fx import fold, inject, trace
from lora_fx.errors import ExportError
from lora_fx.export import Session, add_lora, export_adapter, merge_onnx, quantize_onnx, to_onnx
from lora_fx.export.verification.file_run import Run
from lora_fx.export.verification.made_inputs import feeds_for
from lora_fx.numerics import compare
from lora_fx.testing import make_adapter

SOURCE = np.random.default_rng(0)
FIRST, SECOND, X = (SOURCE.standard_normal(s).astype(np.float32) for s in ((3, 5), (5, 5), (4, 3)))


def saved(
    path: Path, nodes: list[onnx.NodeProto], held: dict[str, Any], *flags: str, opset: int = 20
) -> Path:
    """A file of x (n, 3) and flags that gives y."""
    takes = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])]
    takes += [helper.make_tensor_value_info(name, TensorProto.BOOL, [1]) for name in flags]
    gives = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b"])]
    stored = [numpy_helper.from_array(value, name) for name, value in held.items()]
    graph = helper.make_graph(nodes, "g", takes, gives, stored)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), str(path))
    return path


def first() -> onnx.NodeProto:
    return helper.make_node("MatMul", ["x", "fc.weight"], ["h"])


def in_parts() -> list[onnx.NodeProto]:
    split = helper.make_node("Split", ["w"], ["w1", "w2"], axis=1, num_outputs=2)
    return [split, helper.make_node("MatMul", ["h", "w2"], ["y"])]


OTHERS: dict[str, tuple[list[onnx.NodeProto], dict[str, Any]]] = {
    "Einsum": ([helper.make_node("Einsum", ["h", "w"], ["y"], equation="ni,io->no")], {}),
    "MatMul y": (in_parts(), {"w": np.concatenate([SECOND, SECOND], 1)}),
    "MatMul scaled": (
        [helper.make_node("Mul", ["w", "half"], ["v"]),
         helper.make_node("MatMul", ["h", "v"], ["y"], name="scaled")],
        {"half": np.float32(0.5) * np.ones(1, np.float32)},
    ),
    "MatMul left": (
        [helper.make_node("Transpose", ["h"], ["t"], perm=[1, 0]),
         helper.make_node("MatMul", ["w", "t"], ["y"], name="left")],
        {},
    ),
    "FusedMatMul": (
        [helper.make_node("FusedMatMul", ["h", "w"], ["y"], domain="com.microsoft")], {},
    ),
    "MatMulInteger": (
        [helper.make_node("DynamicQuantizeLinear", ["h"], ["q", "s", "z"]),
         helper.make_node("MatMulInteger", ["q", "w", "z"], ["i"]),
         helper.make_node("Cast", ["i"], ["y"], to=TensorProto.FLOAT)],
        {"w": np.arange(25, dtype=np.int8).reshape(5, 5)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_multiplies_in_another_way_is_named(name: str, tmp_path: Path) -> None:
    nodes, held = OTHERS[name]
    stored = {"fc.weight": FIRST, "w": SECOND} | held
    base = saved(tmp_path / "base.onnx", [first(), *nodes], stored)
    report = add_lora(base, tmp_path / "slots.onnx")
    assert report.slots == ["fc"]
    assert len(report.notes) == 1
    assert f"no slot can stand beside {name}" in report.notes[0]
    assert "(w)" in report.notes[0]
    with pytest.raises(ExportError, match=r"no layer at other.*no slot can stand beside"):
        add_lora(base, tmp_path / "none.onnx", slots=["other"])


def test_a_plain_file_has_nothing_to_name(tmp_path: Path) -> None:
    nodes = [first(), helper.make_node("MatMul", ["h", "out.weight"], ["y"])]
    base = saved(tmp_path / "base.onnx", nodes, {"fc.weight": FIRST, "out.weight": SECOND})
    assert not add_lora(base, tmp_path / "slots.onnx").notes


def test_a_file_without_layers_says_what_it_computes_with(tmp_path: Path) -> None:
    """As skl2onnx and xgboost write what they trained: weights are attributes of its nodes."""
    nodes = [helper.make_node("Tanh", ["x"], ["h"]), helper.make_node("Abs", ["h"], ["y"])]
    base = saved(tmp_path / "base.onnx", nodes, {})
    with pytest.raises(ExportError, match=r"there are none; it computes with Tanh, Abs: a layer"):
        add_lora(base, tmp_path / "slots.onnx")


def test_a_file_of_a_head_alone_is_told_how_that_is_quantised(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "fc.weight"], ["y"])
    base = saved(tmp_path / "base.onnx", [node], {"fc.weight": FIRST})
    with pytest.raises(ExportError, match=r"quantised: fc: a head; layers= asks for heads too"):
        quantize_onnx(base, tmp_path / "small.onnx")
    assert quantize_onnx(base, tmp_path / "small.onnx", bits=8, layers=["fc"]).verified


@pytest.mark.parametrize("taken", ["fc.weight_scales", "fc.weight_Q8"])
def test_a_file_may_have_a_name_that_a_weight_in_few_bits_would_get(
    taken: str, tmp_path: Path
) -> None:
    nodes = [first(), helper.make_node("Mul", ["h", taken], ["y"])]
    held = {"fc.weight": FIRST, taken: np.full(5, 2, np.float32)}
    base = saved(tmp_path / "base.onnx", nodes, held)
    assert quantize_onnx(base, tmp_path / "small.onnx", bits=8, layers=["fc"]).verified
    assert add_lora(tmp_path / "small.onnx", tmp_path / "slots.onnx").slots == ["fc"]


def test_a_layer_of_what_is_stored_takes_the_adapter_too(tmp_path: Path) -> None:
    """As a decoder projects its table of positions; folding left the product where it was."""
    table = SOURCE.standard_normal((6, 3)).astype(np.float32)
    nodes = [
        first(),
        helper.make_node("MatMul", ["positions", "fc.weight"], ["p"]),
        helper.make_node("Transpose", ["p"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["h", "t"], ["y"]),
    ]
    base = saved(tmp_path / "base.onnx", nodes, {"fc.weight": FIRST, "positions": table})
    adapter = make_adapter({"fc": (5, 3)}, scale=0.3)
    assert add_lora(base, tmp_path / "slots.onnx").slots == ["fc"]
    export_adapter(adapter, tmp_path / "slots.onnx", tmp_path / "a.onnx_adapter")
    merge_onnx(tmp_path / "slots.onnx", adapter, tmp_path / "merged.onnx")
    update: Any = adapter.updates["fc"]
    made = FIRST + update.delta().T.numpy()
    for found in (
        Session(tmp_path / "slots.onnx").run({"x": X}, tmp_path / "a.onnx_adapter")["y"],
        Session(tmp_path / "merged.onnx").run({"x": X})["y"],
    ):
        assert compare(found, X @ made @ (table @ made).T).ok
        assert not compare(found, X @ made @ (table @ FIRST).T).ok


def two_ways(path: Path) -> Path:
    """A flag chooses one of two layers, each of which has its weight in its branch, of one name."""
    branches = {}
    for name, values in (("then", SECOND), ("else", SECOND + 1)):
        node = helper.make_node("MatMul", ["h", "w"], ["o"], name=f"/{name}_fc/MatMul")
        gives = [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)]
        stored = [numpy_helper.from_array(np.tile(values, (1, 20)), "w")]
        branches[f"{name}_branch"] = helper.make_graph([node], name, [], gives, stored)
    nodes = [first(), helper.make_node("If", ["flag"], ["y"], **branches)]
    return saved(path, nodes, {"fc.weight": FIRST}, "flag")


@pytest.mark.parametrize("above", [0, 1 << 20])
def test_layers_of_both_branches_are_opened_and_verified(above: int, tmp_path: Path) -> None:
    base, out = two_ways(tmp_path / "base.onnx"), tmp_path / "slots.onnx"
    report = add_lora(base, out, external_data_above=above)
    assert report.slots == ["fc", "else_fc", "then_fc"]
    assert {row.shape for row in report.checks} == {
        f"{size}{way}" for size in ("n=1", "n=2") for way in ("", ", flag=0")
    }
    shapes = {"fc": (5, 3), "then_fc": (100, 5), "else_fc": (100, 5)}
    adapter = make_adapter(shapes, scale=0.3)
    export_adapter(adapter, out, tmp_path / "a.onnx_adapter")
    merge_onnx(out, adapter, tmp_path / "merged.onnx", external_data_above=above)
    updates: Any = adapter.updates
    deltas = {path: update.delta().T.numpy() for path, update in updates.items()}
    for flag, path, own in ((True, "then_fc", SECOND), (False, "else_fc", SECOND + 1)):
        feeds, weight = {"x": X, "flag": np.array([flag])}, np.tile(own, (1, 20))
        wanted = X @ (FIRST + deltas["fc"]) @ (weight + deltas[path])
        for found in (
            Session(out).run(feeds, tmp_path / "a.onnx_adapter")["y"],
            Session(tmp_path / "merged.onnx").run(feeds)["y"],
        ):
            assert compare(found, wanted).ok
            assert not compare(found, X @ (FIRST + deltas["fc"]) @ weight).ok


def test_a_head_in_a_branch_stays(tmp_path: Path) -> None:
    report = quantize_onnx(two_ways(tmp_path / "base.onnx"), tmp_path / "q.onnx", bits=8)
    assert report.quantised is not None
    assert report.quantised.left == {"then_fc": "a head", "else_fc": "a head"}


def test_an_image_has_the_channels_of_its_convolution_and_a_side_that_its_positions_fit(
    tmp_path: Path,
) -> None:
    kernel, positions = np.ones((2, 3, 80, 80), np.float32), np.ones((1, 2, 16), np.float32)
    nodes = [
        helper.make_node("Conv", ["image", "patch.weight"], ["c"], strides=[48, 48]),
        helper.make_node("Reshape", ["c", "flat"], ["r"]),
        helper.make_node("Add", ["r", "positions"], ["y"]),
    ]
    held = {"patch.weight": kernel, "positions": positions, "flat": np.array([0, 0, -1])}
    path = saved(tmp_path / "base.onnx", nodes, held)
    model = onnx.load(path)
    axes = ["batch", "channels", "height", "width"]
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("image", TensorProto.FLOAT, axes))
    onnx.save(model, path)
    feeds = feeds_for(Run(path), model)
    assert {f["image"].shape for f in feeds.values()} == {(1, 3, 224, 224), (2, 3, 224, 224)}


def test_a_file_that_gives_sequences_and_words_is_verified(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "fc.weight"], ["h"]),
        helper.make_node("SequenceConstruct", ["h", "x"], ["y"]),
        helper.make_node("ArgMax", ["h"], ["best"], axis=1, keepdims=0),
        helper.make_node("Gather", ["words", "best"], ["word"]),
    ]
    words = np.array(["a", "b", "c", "d", "e"], dtype=object)
    path = saved(tmp_path / "base.onnx", nodes, {"fc.weight": FIRST, "words": words})
    model = onnx.load(path)
    sequence = helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)
    model.graph.output[0].CopyFrom(sequence)
    model.graph.output.append(helper.make_tensor_value_info("word", TensorProto.STRING, ["n"]))
    onnx.save(model, path)
    report = add_lora(path, tmp_path / "slots.onnx")
    assert report.slots == ["fc"]
    assert {check.output for check in report.checks} == {"y[0]", "y[1]", "word"}
    adapter = make_adapter({"fc": (5, 3)})
    merged = merge_onnx(tmp_path / "slots.onnx", adapter, tmp_path / "merged.onnx")
    assert all(control.ok for control in merged.controls if control.output == "y[0]")
    assert quantize_onnx(path, tmp_path / "small.onnx", bits=8, layers=["*"]).verified


def test_a_file_that_gives_maps_is_refused_with_what_to_do(tmp_path: Path) -> None:
    node = helper.make_node(
        "ZipMap", ["h"], ["y"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2, 3, 4]
    )
    path = saved(tmp_path / "base.onnx", [first(), node], {"fc.weight": FIRST})
    model = onnx.load(path)
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 1))
    row = model.graph.output[0].type
    row.Clear()
    row.sequence_type.elem_type.map_type.key_type = TensorProto.INT64
    row.sequence_type.elem_type.map_type.value_type.tensor_type.elem_type = TensorProto.FLOAT
    onnx.save(model, path)
    with pytest.raises(ExportError, match=r"not read: Map types .*ZipMap.* zipmap is off"):
        add_lora(path, tmp_path / "slots.onnx")


@pytest.mark.parametrize("window", [0, 12])
def test_a_cache_of_a_builder_s_has_heads_of_the_file_s_size(window: int, tmp_path: Path) -> None:
    """onnxruntime-genai's builder says of a head only that it has a size, and of what a sum is."""
    heads, size = 2, 24
    slides = {"local_window_size": window, "sliding_window_cache": 1} if window else {}
    reads = ["qkv", "", "", "past_key_values.0.key", "past_key_values.0.value", "seen", "all"]
    nodes = [
        helper.make_node("MatMul", ["x", "qkv.weight"], ["qkv"]),
        helper.make_node("ReduceSum", ["mask", "last"], ["sums"], keepdims=0),
        helper.make_node("Sub", ["sums", "last"], ["less"]),
        helper.make_node("Cast", ["less"], ["seen"], to=TensorProto.INT32),
        helper.make_node("Shape", ["mask"], ["shape"], start=1, end=2),
        helper.make_node("Squeeze", ["shape"], ["length"]),
        helper.make_node("Cast", ["length"], ["all"], to=TensorProto.INT32),
        helper.make_node(
            "GroupQueryAttention", reads, ["mixed", "present.0.key", "present.0.value"],
            domain="com.microsoft", num_heads=heads, kv_num_heads=heads, **slides,
        ),
        helper.make_node("MatMul", ["mixed", "out.weight"], ["y"]),
    ]  # fmt: skip
    width = heads * size
    held = {
        "qkv.weight": SOURCE.standard_normal((8, 3 * width)).astype(np.float32),
        "out.weight": SOURCE.standard_normal((width, 4)).astype(np.float32),
        "last": np.array([1]),
    }
    path = saved(tmp_path / "base.onnx", nodes, held)
    model, past = onnx.load(path), "past_sliding_length" if window else "past_length"
    cache = ["batch", heads, past, "kv_cache_dim"]
    takes = {
        "x": (TensorProto.FLOAT, ["batch", "length", 8]),
        "mask": (TensorProto.INT64, ["batch", "total_length"]),
        "past_key_values.0.key": (TensorProto.FLOAT, cache),
        "past_key_values.0.value": (TensorProto.FLOAT, cache),
    }
    del model.graph.input[:], model.graph.output[:]
    model.graph.input.extend(helper.make_tensor_value_info(n, *of) for n, of in takes.items())
    gives = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length", 4])
    model.graph.output.append(gives)
    onnx.save(model, path)
    feeds = feeds_for(Run(path), model)
    shapes = [feeds[n]["past_key_values.0.key"].shape for n in feeds]
    assert {shape[-1] for shape in shapes} == {size}
    assert {shape[2] for shape in shapes} == ({window} if window else {1, 0})  # a token, a prompt
    assert window or max(given["x"].shape[1] for given in feeds.values()) > 1
    assert add_lora(path, tmp_path / "slots.onnx").slots == ["qkv", "out"]


def test_a_file_that_holds_an_adapter_beside_its_layers_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 5)), torch.randn(4, 12)
    injected = inject(trace(model.eval(), (x,)), make_adapter({"0": (9, 12), "2": (5, 9)}))
    for gm, name in ((injected, "unmerged"), (fold(injected), "merged")):
        to_onnx(gm, tmp_path / f"{name}.onnx")
    with pytest.raises(ExportError, match=r"an adapter stands beside its layers already \(0\.lora"):
        add_lora(tmp_path / "unmerged.onnx", tmp_path / "out.onnx")
    assert add_lora(tmp_path / "merged.onnx", tmp_path / "out.onnx").slots == ["0", "2"]


@pytest.mark.parametrize("bias", ["fc.bias", "fc.in_proj_bias"])
def test_a_name_that_onnxslim_made_of_an_exporter_s_number_is_none(
    bias: str, tmp_path: Path
) -> None:
    node = helper.make_node("Gemm", ["x", "val_87_weight", bias], ["y"], name="val_87")
    held = {"val_87_weight": FIRST, bias: FIRST[0]}
    assert add_lora(saved(tmp_path / "b.onnx", [node], held), tmp_path / "s.onnx").slots == ["fc"]
