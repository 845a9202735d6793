"""Slots beside weights in few bits, as onnxruntime's quantisers and builder leave them."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from torch import nn

from lora_fx import Adapter, AdapterError, Update
from lora_fx.errors import ExportError
from lora_fx.export import add_lora, export_adapter, merge_onnx
from lora_fx.export.verification.file_run import Run
from lora_fx.numerics import compare
from lora_fx.testing import make_adapter


@pytest.fixture(scope="module")
def unquantised(
    torch_file: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[nn.Module, torch.Tensor, Path]:
    """A model, an input and its file: only read."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 17)), torch.randn(4, 6, 32)
    path = tmp_path_factory.mktemp("unquantised") / "plain.onnx"
    return model, x, torch_file(model, x, path, dynamo=True)


def quantised(path: Path, out: Path, **options: Any) -> Path:
    quantizer = MatMulNBitsQuantizer(onnx.load(path), block_size=16, **options)
    quantizer.process()
    quantizer.model.save_model_to_file(str(out), False)
    return out


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "is_symmetric": True},
        {"bits": 4, "is_symmetric": False},
        {"bits": 8, "is_symmetric": True},
        {"bits": 4, "is_symmetric": False, "quant_format": QuantFormat.QDQ},
    ],
)
def test_a_quantised_base_takes_adapters_in_float(
    with_adapter: Any, options: Any, unquantised: tuple[Any, torch.Tensor, Path], tmp_path: Path
) -> None:
    model, x, plain = unquantised
    base = quantised(plain, tmp_path / "base.onnx", **options)
    adapter = make_adapter({"0": (48, 32), "2": (17, 48)}, scale=0.2)
    with_adapter(base, adapter, x, tmp_path)
    files = (
        (base, None),
        (tmp_path / "slots.onnx", None),
        (tmp_path / "slots.onnx", tmp_path / "a.onnx_adapter"),
    )
    # Unoptimised: onnxruntime rounds activations to 8 bits where it fuses a DequantizeLinear.
    before, alone, adapted = (unoptimised(*file, x) for file in files)
    assert compare(alone, before).ok
    # The weight that the file stands for: what it gives of one row of the identity each.
    updates: Any = adapter.updates
    hidden = [torch.eye(32), torch.eye(48)]
    weights = [of_node(base, place, rows) for place, rows in enumerate(hidden)]
    biases = [model[0].bias, model[2].bias]
    with torch.no_grad():
        h = torch.tanh(x @ (weights[0] + updates["0"].delta().T) + biases[0])
        wanted = h @ (weights[1] + updates["2"].delta().T) + biases[1]
    assert compare(adapted, wanted).ok
    assert compare(alone, wanted).relative > 1e-2
    with pytest.raises(ExportError, match="no weight of plain numbers"):
        merge_onnx(tmp_path / "slots.onnx", adapter, tmp_path / "m.onnx")
    report = merge_onnx(tmp_path / "slots.onnx", adapter, tmp_path / "m.onnx", allow_unmerged=True)
    assert report.mode == "unmerged"
    assert compare(unoptimised(tmp_path / "m.onnx", None, x), wanted).ok
    dora = Update(torch.randn(2, 32), torch.randn(48, 2), 1.0, magnitude=torch.rand(48) + 1)
    with pytest.raises(AdapterError, match="the slot takes none"):
        export_adapter(Adapter("dora", {"0": dora}), tmp_path / "slots.onnx", tmp_path / "d")


def test_a_base_with_activations_in_8_bits_is_held_to_what_its_graph_says(
    with_adapter: Any, eager: Any, unquantised: tuple[Any, torch.Tensor, Path], tmp_path: Path
) -> None:
    """onnxruntime fuses products of 8 bits, with other rounding, where no branch is beside them."""
    model, x, plain = unquantised
    base, given = tmp_path / "base.onnx", [{"x": 2 * x.numpy()}]
    reader: Any = SimpleNamespace(get_next=lambda: given.pop() if given else None)
    quantize_static(plain, base, reader, weight_type=QuantType.QInt8, per_channel=True)
    assert {"DequantizeLinear", "QuantizeLinear"} <= {n.op_type for n in onnx.load(base).graph.node}
    adapter = make_adapter({"0": (48, 32)}, scale=0.05)
    notes = add_lora(base, tmp_path / "noted.onnx").notes
    assert [note.split(":")[0] for note in notes] == ["0, 2"]
    assert "cut off" in notes[0]
    alone, adapted = with_adapter(base, adapter, x, tmp_path)
    wanted_alone, wanted = eager(copy.deepcopy(model), adapter, x)
    assert compare(alone, wanted_alone).relative < 0.05
    assert compare(adapted, wanted).relative < 0.05
    assert compare(adapted, wanted_alone).relative > 0.2


def as_by_the_builder(file: onnx.ModelProto) -> None:
    """As onnxruntime-genai writes files: a constant of one number is said to have no axis."""
    h, one = onnx.helper, numpy_helper.from_array(np.array([1]), "value")
    file.producer_name = "onnxruntime-genai"
    file.graph.node.append(h.make_node("Constant", [], ["one"], value=one))
    file.graph.value_info.append(h.make_tensor_value_info("one", onnx.TensorProto.INT64, []))


def test_a_file_of_onnxruntime_genai_s_builder(
    with_adapter: Any, eager: Any, unquantised: tuple[Any, torch.Tensor, Path], tmp_path: Path
) -> None:
    """x is rounded to 8 bits in its products; its attention is what PEFT calls ``self_attn``."""
    model, x, plain = unquantised
    base = quantised(plain, tmp_path / "base.onnx", bits=8, accuracy_level=4)
    file = onnx.load(base)
    as_by_the_builder(file)
    onnx.save(file, base)
    weights = [node.input[1] for node in file.graph.node if node.op_type == "MatMulNBits"]
    names = {weights[0]: "layers.0.attn.q_proj", weights[1]: "layers.0.attn.o_proj"}
    adapter = make_adapter({"0": (48, 32), "2": (17, 48)}, scale=0.3)
    called = Adapter("a", {
        "layers.0.self_attn.q_proj": adapter.updates["0"],
        "layers.0.self_attn.o_proj": adapter.updates["2"],
    })  # fmt: skip
    alone, adapted = with_adapter(base, called, x, tmp_path, names=names)
    wanted_alone, wanted = eager(copy.deepcopy(model), adapter, x)
    assert compare(alone, wanted_alone).relative < 0.02
    assert compare(adapted, wanted).relative < 0.02
    assert compare(adapted, wanted_alone).relative > 0.2
    file.producer_name = "another"
    onnx.save(file, base)
    report = add_lora(base, tmp_path / "slots.onnx", names=names, verify=False, force=True)
    assert not report.verified
    with pytest.raises(AdapterError, match=r"no slot at layers\.0\.self_attn"):
        export_adapter(called, tmp_path / "slots.onnx", tmp_path / "b.onnx_adapter")


def unoptimised(path: Path, adapter: Path | None, x: torch.Tensor) -> Any:
    return Run(path, adapter).outputs({"": {"x": x.numpy()}}, optimise=False)[""]["y"]


def of_node(base: Path, place: int, rows: torch.Tensor) -> torch.Tensor:
    """What one product of a file gives, run alone."""
    model = onnx.load(base)
    node = [n for n in model.graph.node if "MatMul" in n.op_type][place]
    before = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
    x, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in (node.input[0], node.output[0])
    )
    graph = onnx.helper.make_graph([*before, node], "part", [x], [y], model.graph.initializer)
    kept = {"opset_imports": model.opset_import, "ir_version": model.ir_version}
    part = onnx.helper.make_model(graph, **kept)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(part.SerializeToString(), options)
    return torch.from_numpy(session.run(None, {node.input[0]: rows.numpy()})[0])


def casting(kind: int, batch: int | str, path: Path) -> Path:
    """``x @ Cast(W)``, with W in a type of less than a byte or two."""
    make = onnx.helper
    x, y = (make.make_tensor_value_info(n, 1, [batch, size]) for n, size in (("x", 6), ("y", 4)))
    nodes = [
        make.make_node("Cast", ["fc.weight"], ["w"], to=1),
        make.make_node("MatMul", ["x", "w"], ["y"], name="/fc/MatMul"),
    ]
    weight = make.make_tensor("fc.weight", kind, [6, 4], [n % 3 for n in range(24)])
    graph = make.make_graph(nodes, "g", [x], [y], initializer=[weight])
    onnx.save(
        make.make_model(graph, opset_imports=[make.make_opsetid("", 21)], ir_version=10), path
    )
    return path


@pytest.mark.parametrize("kind", ["INT4", "UINT4", "FLOAT8E4M3FN", "FLOAT8E5M2"])
def test_a_weight_of_any_type_that_is_cast_takes_a_slot(kind: str, tmp_path: Path) -> None:
    path = casting(onnx.TensorProto.DataType.Value(kind), "b", tmp_path / "model.onnx")
    assert add_lora(path, tmp_path / "slots.onnx").verified
    adapter = make_adapter({"fc": (4, 6)})
    with pytest.raises(ExportError, match=f"stored as {kind}, which rounds what is added"):
        merge_onnx(tmp_path / "slots.onnx", adapter, tmp_path / "merged.onnx")


@pytest.mark.parametrize("size", [1 << 27, (1 << 63) - 1])
def test_inputs_that_memory_cannot_hold_are_asked_for(size: int, tmp_path: Path) -> None:
    path = casting(onnx.TensorProto.INT4, size, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=rf"'x' of \[{size}, 6\] is more .*give it as inputs="):
        add_lora(path, tmp_path / "slots.onnx")
