"""Slots in a base that somebody else exported, held against W' in its initializers."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from torch import nn

from lora_fx import Adapter, AdapterError, Update, save_adapter
from lora_fx.adapters.adapter import AnyUpdate
from lora_fx.errors import ExportError, VerificationError
from lora_fx.export import Session, add_lora, export_adapter, merge_onnx, quantize_onnx
from lora_fx.export.onnx_model.idle_work import without_idle_work
from lora_fx.export.rewriting import add_lora as room
from lora_fx.export.verification.file_run import Run
from lora_fx.numerics import compare
from lora_fx.testing import Blocks, Ragged, Tied, make_adapter

Shapes = Mapping[str, tuple[int, ...]]


def exported(model: nn.Module, x: torch.Tensor, path: Path, dynamo: bool = False) -> Path:
    """A file as torch.onnx writes it."""
    with warnings.catch_warnings(), without_idle_work():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(), (x,), str(path), dynamo=dynamo, verbose=False, external_data=False,
            input_names=["x"], output_names=["y"],
        )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def by_default(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as torch.onnx writes it where nothing is asked for."""
    base = tmp_path_factory.mktemp("theirs") / "base.onnx"
    model = nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 5)).eval()
    with warnings.catch_warnings(), without_idle_work():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (torch.randn(4, 12),), str(base), dynamo=True, verbose=False,
            input_names=["x"], output_names=["y"],
        )  # fmt: skip
    return base


@pytest.mark.parametrize("above", [0, 1 << 20])
def test_weights_beside_a_file_as_torch_writes_them_by_default(
    by_default: Path, tmp_path: Path, above: int
) -> None:
    """Into the new file, or into one beside it, in another directory: the old one may go."""
    x, adapter = torch.randn(4, 12), make_adapter({"0": (30, 12)})
    base = shutil.copytree(by_default.parent, tmp_path / "theirs") / "base.onnx"
    assert base.with_name("base.onnx.data").stat().st_size > 0
    plain, expected = Session(base).run({"x": x})["y"], tmp_path / "merged.onnx"
    _, tuned = with_adapter(base, adapter, x, tmp_path, external_data_above=above)
    merge_onnx(tmp_path / "slots.onnx", adapter, expected, external_data_above=above)
    shutil.rmtree(base.parent)
    assert compare(Session(expected).run({"x": x})["y"], tuned).ok
    assert compare(Session(tmp_path / "slots.onnx").run({"x": x})["y"], plain).ok
    assert not compare(tuned, plain).ok


def with_adapter(
    base: Path, adapter: Adapter, x: torch.Tensor, directory: Path, **options: Any
) -> Any:
    """What a base gives after slots, without an adapter and with one."""
    out, file = directory / "slots.onnx", directory / "a.onnx_adapter"
    report = add_lora(base, out, **options)
    assert report.verified
    export_adapter(adapter, out, file)
    session = Session(out)
    return session.run({"x": x})["y"], session.run({"x": x}, file)["y"]


def eager(model: nn.Module, adapter: Adapter, x: torch.Tensor) -> Any:
    """The model with W' in place of W, and as it is."""
    updates: Mapping[str, AnyUpdate] = adapter.updates
    with torch.no_grad():
        base = model(x)
        for path, update in updates.items():
            layer: Any = model.get_submodule(path)
            is_table = isinstance(layer, nn.Embedding)
            own = layer.weight.T if is_table else layer.weight
            made = update.weight(own)
            layer.weight.copy_(made.T if is_table else made)
        return base, model(x)


class PastItsParent(nn.Module):
    """Calls a child of a child: in TorchScript's scopes the one between has no name."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.decoder = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 7))
        self.head = nn.Linear(7, 2, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.model.decoder(x))  # type: ignore[operator]


ROWS, IMAGES = torch.randn(4, 6, 3), torch.randn(2, 4, 8, 8)
MODELS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, Shapes]] = {
    "weights by anonymous names": (
        Ragged, ROWS, {"wide": (5, 3), "again": (5, 5), "narrow": (7, 5)},
    ),
    "a module that is not called itself": (
        PastItsParent, ROWS, {"model.decoder.0": (5, 3), "model.decoder.2": (7, 5), "head": (2, 7)},
    ),
    "Gemm": (Blocks, torch.randn(4, 3), {"fc": (5, 3), "layers.1": (6, 7), "classifier": (2, 9)}),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(6, 5, 3)
        ),
        IMAGES, {"0": (6, 4, 3, 3), "2": (5, 6, 3, 3)},
    ),
    "a table": (
        lambda: nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 3)),
        torch.randint(0, 7, (2, 3)), {"0": (5, 7), "1": (3, 5)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_file_of_torch_takes_adapters_by_module_path(
    name: str, dynamo: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    make, x, shapes = MODELS[name]
    model, adapter = make(), make_adapter(shapes, rank=3, scale=0.3)
    base = exported(model, x, tmp_path / "base.onnx", dynamo)
    slots = list(shapes) if name in ("convolutions", "a table") else "all-linear"
    alone, adapted = with_adapter(base, adapter, x, tmp_path, slots=slots)
    wanted_alone, wanted = eager(model, adapter, x)
    assert compare(alone, wanted_alone).ok
    assert compare(adapted, wanted).ok
    assert compare(adapted, wanted_alone).relative > 1e-2
    report = merge_onnx(tmp_path / "slots.onnx", adapter, tmp_path / "merged.onnx")
    assert report.mode == "merged"
    assert compare(Session(tmp_path / "merged.onnx").run({"x": x})["y"], wanted).ok


class Normed(nn.Module):
    """A convolution with a batch-norm behind it, which exporters make one layer of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1)
        with torch.no_grad():
            self.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            self.norm.weight.uniform_(0.5, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(self.norm(self.conv(x)))


@pytest.mark.parametrize("fused_by", ["TorchScript", "dynamo", "onnxruntime", "by no name"])
def test_a_weight_that_a_batch_norm_was_fused_into_takes_no_adapter(
    fused_by: str, tmp_path: Path
) -> None:
    """Beside another layer it does, and beside this where the norm stayed: held against W'."""
    torch.manual_seed(0)
    model, kept = Normed().eval(), tmp_path / "kept.onnx"
    adapter = make_adapter({"conv": (6, 4, 3, 3), "last": (5, 6, 1, 1)}, rank=3, scale=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (IMAGES,), str(kept), dynamo=False, do_constant_folding=False,
            input_names=["x"], output_names=["y"],
        )  # fmt: skip
    if fused_by == "onnxruntime":
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(tmp_path / "base.onnx")
        ort.InferenceSession(str(kept), options)
    else:
        exported(model, IMAGES, tmp_path / "base.onnx", fused_by == "dynamo")
    if fused_by == "by no name":  # as onnxsim leaves it
        file = onnx.load(tmp_path / "base.onnx")
        first = file.graph.node[0].input[1]
        weight = next(tensor for tensor in file.graph.initializer if tensor.name == first)
        weight.name = file.graph.node[0].input[1] = "_v_14"
        onnx.save(file, tmp_path / "base.onnx")
    with pytest.raises(ExportError, match=r"conv \(weight .*fused into"):
        add_lora(tmp_path / "base.onnx", tmp_path / "slots.onnx", slots=["*"])
    assert add_lora(tmp_path / "base.onnx", tmp_path / "last.onnx", slots=["last"]).verified
    alone, adapted = with_adapter(kept, adapter, IMAGES, tmp_path, slots=["*"])
    wanted_alone, wanted = eager(model, adapter, IMAGES)
    assert compare(alone, wanted_alone).ok
    assert compare(adapted, wanted).ok
    assert compare(adapted, wanted_alone).relative > 1e-2
    weight = onnx.load(tmp_path / "base.onnx").graph.node[0].input[1]
    taken = add_lora(
        tmp_path / "base.onnx", tmp_path / "taken.onnx", slots=["conv"], names={weight: "conv"}
    )
    assert taken.slots == ["conv"]


def test_an_empty_slot_changes_no_bit(tmp_path: Path) -> None:
    base = exported(Ragged(), ROWS, tmp_path / "base.onnx")
    report = add_lora(base, tmp_path / "slots.onnx")
    assert {row.max_abs for row in report.checks if row.what == "base"} == {0.0}
    before, after = (
        Session(tmp_path / n).run({"x": ROWS})["y"] for n in ("base.onnx", "slots.onnx")
    )
    assert before.tobytes() == after.tobytes()


def test_nodes_are_called_after_the_path_and_a_second_call_is_the_same_slot(tmp_path: Path) -> None:
    base = exported(Ragged(), ROWS, tmp_path / "base.onnx")
    report = add_lora(base, tmp_path / "slots.onnx")
    assert report.slots == ["wide", "again", "narrow"]
    names = [n.name for n in onnx.load(tmp_path / "slots.onnx").graph.node]
    assert [n for n in names if "lora" in n and n.startswith("again")] == [
        "again/lora_A/MatMul", "again/lora_B/MatMul", "again/lora/Add",
        "again/lora_A/MatMul_1", "again/lora_B/MatMul_1", "again/lora/Add_1",
    ]  # fmt: skip


def anonymous(path: Path) -> Path:
    """Two products whose weights and nodes say nothing."""
    rows = [torch.randn(3, 5), torch.randn(5, 4)]
    values = [
        ir.Value(
            name=f"onnx::MatMul_{n}", const_value=ir.tensor(w.numpy()), shape=ir.Shape(w.shape),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        for n, w in enumerate(rows)
    ]  # fmt: skip
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=("n", 3))
    one = ir.node("MatMul", [x, values[0]], name="node_1")
    act = ir.node("Tanh", one.outputs)
    two = ir.node("MatMul", [*act.outputs, values[1]], name="node_2")
    y = two.outputs[0]
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape(["n", 4])
    graph = ir.Graph([x], [y], nodes=[one, act, two], initializers=values, opset_imports={"": 20})
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


def test_names_are_given_where_a_file_has_none(tmp_path: Path) -> None:
    base, out = anonymous(tmp_path / "base.onnx"), tmp_path / "slots.onnx"
    with pytest.raises(
        ExportError, match=r"there are none; without a name: onnx::MatMul_0, .*names="
    ):
        add_lora(base, out)
    with pytest.raises(ExportError, match=r"called nothing; there are onnx::MatMul_0"):
        add_lora(base, out, names={"nothing": "fc"})
    with pytest.raises(ExportError, match="fc: two layers of one name: nodes node_1, node_2"):
        add_lora(base, out, names={"node_1": "fc", "node_2": "fc"})
    assert not list(tmp_path.glob("*slots*"))
    report = add_lora(base, out, names={"onnx::MatMul_0": "fc"})
    assert report.slots == ["fc"]
    assert report.notes == ["no slot for what has no name: onnx::MatMul_1: names= gives one"]
    add_lora(base, out, names={"onnx::MatMul_0": "fc", "node_2": "head"}, slots=["h*"], force=True)
    assert Session(out).slots == ["head"]
    with pytest.raises(ExportError, match="has slots already"):
        add_lora(out, tmp_path / "again.onnx")


def test_a_weight_of_a_few_numbers_in_a_node_is_one(tmp_path: Path) -> None:
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


def test_a_table_whose_rows_are_counted_from_behind(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = nn.Sequential(nn.Embedding(7, 5)), torch.randint(0, 7, (2, 3))
    file = onnx.load(exported(model, ids, tmp_path / "base.onnx"))
    (gather,) = file.graph.node
    del gather.attribute[:]
    gather.attribute.append(onnx.helper.make_attribute("axis", -2))
    onnx.save(file, tmp_path / "base.onnx")
    adapter = make_adapter({"0": (5, 7)}, scale=0.3)
    alone, adapted = with_adapter(tmp_path / "base.onnx", adapter, ids, tmp_path, slots=["0"])
    merge_onnx(tmp_path / "slots.onnx", adapter, tmp_path / "merged.onnx")
    wanted = eager(model, adapter, ids)[1]
    assert compare(adapted, wanted).ok
    assert compare(Session(tmp_path / "merged.onnx").run({"x": ids})["y"], wanted).ok
    assert compare(alone, wanted).relative > 1e-2


def test_a_table_that_is_the_head_has_a_slot_for_each(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Tied(), torch.randint(0, 6, (2, 3))
    base = exported(model, x, tmp_path / "base.onnx")
    node = next(n.name for n in onnx.load(base).graph.node if n.op_type == "MatMul")
    adapter = make_adapter({"head": (6, 5)}, scale=0.3)
    alone, adapted = with_adapter(base, adapter, x, tmp_path, slots=["*"], names={node: "head"})
    assert Session(tmp_path / "slots.onnx").slots == ["table", "head"]
    update: Any = adapter.updates["head"]
    with torch.no_grad():
        wanted = model.table(x) @ (model.table.weight + update.delta()).T
    assert compare(adapted, wanted).ok
    assert compare(alone, wanted).relative > 1e-2


class SharedWeights(nn.Module):
    """Two layers of one weight, and a table that is the head: four modules, two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
        self.one, self.other = nn.Linear(5, 5), nn.Linear(5, 5)
        self.head.weight, self.other.weight = self.table.weight, self.one.weight

    def forward(self, ids: torch.Tensor) -> Any:
        return self.head(self.other(torch.tanh(self.one(self.table(ids)))))


@pytest.mark.parametrize("dynamo", [False, True])
def test_modules_of_one_weight_have_a_slot_each(dynamo: bool, tmp_path: Path) -> None:
    """The weight bears the name of one of them, and an adapter of that is none of the other's."""
    torch.manual_seed(0)
    model, ids = SharedWeights(), torch.randint(0, 7, (4,))
    base = exported(model, ids, tmp_path / "base.onnx", dynamo)
    shapes = {"table": (5, 7), "head": (7, 5), "one": (5, 5), "other": (5, 5)}
    assert set(add_lora(base, tmp_path / "slots.onnx", slots=["*"]).slots) == set(shapes)
    for path, shape in shapes.items():
        adapter, file = make_adapter({path: shape}, rank=3, scale=0.3), tmp_path / f"{path}.lora"
        export_adapter(adapter, tmp_path / "slots.onnx", file)
        adapted = Session(tmp_path / "slots.onnx").run({"x": ids}, file)["y"]
        together, apart = copy.deepcopy(model), copy.deepcopy(model)
        for layer in (apart.head, apart.other):
            layer.weight = nn.Parameter(layer.weight.detach().clone())
        assert compare(adapted, eager(apart, adapter, ids)[1]).ok
        assert not compare(adapted, eager(together, adapter, ids)[1]).ok


@pytest.fixture(scope="module")
def unquantised(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, torch.Tensor, Path]:
    """A model, an input and its file: only read."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 17)), torch.randn(4, 6, 32)
    path = tmp_path_factory.mktemp("unquantised") / "plain.onnx"
    return model, x, exported(model, x, path, dynamo=True)


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
    options: Any, unquantised: tuple[Any, torch.Tensor, Path], tmp_path: Path
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


@pytest.mark.parametrize("beside", ["fc.bias", "fc.weight_g_idx"])
def test_a_layer_in_few_bits_with_a_bias_or_an_order_of_its_own_takes_slots(
    beside: str, tmp_path: Path
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


def test_a_base_with_activations_in_8_bits_is_held_to_what_its_graph_says(
    unquantised: tuple[Any, torch.Tensor, Path], tmp_path: Path
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
    unquantised: tuple[Any, torch.Tensor, Path], tmp_path: Path
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


def test_initializers_that_are_inputs_become_constants(tmp_path: Path) -> None:
    model = onnx.load(exported(Blocks(), torch.randn(4, 3), tmp_path / "base.onnx"))
    for tensor in model.graph.initializer:
        info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.append(info)
    onnx.save(model, str(tmp_path / "old.onnx"))
    report = add_lora(tmp_path / "old.onnx", tmp_path / "slots.onnx")
    assert report.inputs == ["x"]
    assert Session(tmp_path / "slots.onnx").slots == report.slots


def test_groups_have_a_slot_that_reads_all_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Tanh(), nn.Conv2d(6, 6, 3, groups=6))
    base = exported(model, IMAGES, tmp_path / "base.onnx")
    adapter = make_adapter({"0": (6, 4, 3, 3)}, scale=0.2)
    alone, adapted = with_adapter(base, adapter, IMAGES, tmp_path, slots=["*"])
    update: Any = adapter.updates["0"]
    with torch.no_grad():
        own = model[0](IMAGES) + torch.nn.functional.conv2d(IMAGES, update.delta())
        wanted = model[2](torch.tanh(own))
    assert compare(adapted, wanted).ok
    assert compare(alone, wanted).relative > 1e-2


def test_a_slot_that_was_put_in_wrong_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, kept = exported(Ragged(), ROWS, tmp_path / "base.onnx"), room.insert_slot

    def wrong(model: ir.Model, slot: Any, calls: Any) -> None:
        kept(model, slot, calls[:1])  # a second call of the layer goes without

    monkeypatch.setattr(room, "insert_slot", wrong)
    with pytest.raises((VerificationError, ExportError)):
        add_lora(base, tmp_path / "slots.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["base.onnx"]


def test_peft_s_own_directory_fits(tmp_path: Path) -> None:
    base = exported(Blocks(), torch.randn(4, 3), tmp_path / "base.onnx")
    save_adapter(make_adapter({"fc": (5, 3)}), tmp_path / "peft")
    add_lora(base, tmp_path / "slots.onnx")
    export_adapter(tmp_path / "peft", tmp_path / "slots.onnx", tmp_path / "a.onnx_adapter")
    stored = {
        t.name: numpy_helper.to_array(t)
        for t in onnx.load(tmp_path / "slots.onnx").graph.initializer
    }
    assert stored["fc.lora_A"].shape == (3, 0)
    assert np.array_equal(stored["fc.weight"], numpy_helper.to_array(
        next(t for t in onnx.load(base).graph.initializer if t.name == "fc.weight")))  # fmt: skip


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
def test_a_layer_in_a_branch_or_a_function_takes_the_adapter_too(how: str, tmp_path: Path) -> None:
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
def test_a_layer_that_is_called_where_no_slot_stands_is_refused(how: str, tmp_path: Path) -> None:
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
    change: Callable[[onnx.ModelProto], None], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 5)), torch.randn(4, 12)
    model.half().float()
    file = onnx.load(exported(model, x, tmp_path / "base.onnx"))
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
    norm: nn.Module, tmp_path: Path
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


def test_a_second_call_with_an_equal_weight_takes_the_same_adapter(tmp_path: Path) -> None:
    """A weight that a tool stored once for each of its readers."""
    torch.manual_seed(0)
    model = Ragged()
    base = exported(model, ROWS, tmp_path / "base.onnx")
    file = onnx.load(base)
    first, second = (n for n in file.graph.node if n.name.startswith("/again"))
    tensor = next(t for t in file.graph.initializer if t.name == first.input[1])
    file.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(tensor), "copy"))
    second.input[1] = "copy"
    onnx.save(file, base)
    adapter = make_adapter({"again": (5, 5)}, scale=0.3)
    alone, adapted = with_adapter(base, adapter, ROWS, tmp_path)
    merge_onnx(tmp_path / "slots.onnx", adapter, tmp_path / "merged.onnx")
    wanted_alone, wanted = eager(model.eval(), adapter, ROWS)
    assert Session(tmp_path / "slots.onnx").slots == ["wide", "again", "narrow"]
    assert compare(alone, wanted_alone).ok
    assert compare(adapted, wanted).ok
    assert compare(Session(tmp_path / "merged.onnx").run({"x": ROWS})["y"], wanted).ok
    assert compare(adapted, wanted_alone).relative > 1e-2


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


def test_a_convolution_whose_kernel_is_dequantised(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Tanh())
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_((tensor * 20).round() / 2)
    base = exported(model, IMAGES, tmp_path / "base.onnx")
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
    change: Callable[[onnx.ModelProto], None], tmp_path: Path
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
