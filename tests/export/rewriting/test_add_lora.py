"""Slots in a base that torch.onnx exported, held against W' in its initializers."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from lora_fx import save_adapter
from lora_fx.errors import ExportError, VerificationError
from lora_fx.export import Session, add_lora, export_adapter, merge_onnx
from lora_fx.export.onnx_model.idle_work import without_idle_work
from lora_fx.export.rewriting import add_lora as room
from lora_fx.numerics import compare
from lora_fx.testing import Blocks, Ragged, Tied, make_adapter

Shapes = Mapping[str, tuple[int, ...]]


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
    with_adapter: Any, by_default: Path, tmp_path: Path, above: int
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
    torch_file: Any, with_adapter: Any, eager: Any, name: str, dynamo: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    make, x, shapes = MODELS[name]
    model, adapter = make(), make_adapter(shapes, rank=3, scale=0.3)
    base = torch_file(model, x, tmp_path / "base.onnx", dynamo)
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
    torch_file: Any, with_adapter: Any, eager: Any, fused_by: str, tmp_path: Path
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
        torch_file(model, IMAGES, tmp_path / "base.onnx", fused_by == "dynamo")
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


def test_an_empty_slot_changes_no_bit(torch_file: Any, tmp_path: Path) -> None:
    base = torch_file(Ragged(), ROWS, tmp_path / "base.onnx")
    report = add_lora(base, tmp_path / "slots.onnx")
    assert {row.max_abs for row in report.checks if row.what == "base"} == {0.0}
    before, after = (
        Session(tmp_path / n).run({"x": ROWS})["y"] for n in ("base.onnx", "slots.onnx")
    )
    assert before.tobytes() == after.tobytes()


def test_nodes_are_called_after_the_path_and_a_second_call_is_the_same_slot(
    torch_file: Any, tmp_path: Path
) -> None:
    base = torch_file(Ragged(), ROWS, tmp_path / "base.onnx")
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


def test_a_table_whose_rows_are_counted_from_behind(
    torch_file: Any, with_adapter: Any, eager: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, ids = nn.Sequential(nn.Embedding(7, 5)), torch.randint(0, 7, (2, 3))
    file = onnx.load(torch_file(model, ids, tmp_path / "base.onnx"))
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


def test_a_table_that_is_the_head_has_a_slot_for_each(
    torch_file: Any, with_adapter: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = Tied(), torch.randint(0, 6, (2, 3))
    base = torch_file(model, x, tmp_path / "base.onnx")
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
def test_modules_of_one_weight_have_a_slot_each(
    torch_file: Any, eager: Any, dynamo: bool, tmp_path: Path
) -> None:
    """The weight bears the name of one of them, and an adapter of that is none of the other's."""
    torch.manual_seed(0)
    model, ids = SharedWeights(), torch.randint(0, 7, (4,))
    base = torch_file(model, ids, tmp_path / "base.onnx", dynamo)
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


def test_initializers_that_are_inputs_become_constants(torch_file: Any, tmp_path: Path) -> None:
    model = onnx.load(torch_file(Blocks(), torch.randn(4, 3), tmp_path / "base.onnx"))
    for tensor in model.graph.initializer:
        info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.append(info)
    onnx.save(model, str(tmp_path / "old.onnx"))
    report = add_lora(tmp_path / "old.onnx", tmp_path / "slots.onnx")
    assert report.inputs == ["x"]
    assert Session(tmp_path / "slots.onnx").slots == report.slots


def test_groups_have_a_slot_that_reads_all_inputs(
    torch_file: Any, with_adapter: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Tanh(), nn.Conv2d(6, 6, 3, groups=6))
    base = torch_file(model, IMAGES, tmp_path / "base.onnx")
    adapter = make_adapter({"0": (6, 4, 3, 3)}, scale=0.2)
    alone, adapted = with_adapter(base, adapter, IMAGES, tmp_path, slots=["*"])
    update: Any = adapter.updates["0"]
    with torch.no_grad():
        own = model[0](IMAGES) + torch.nn.functional.conv2d(IMAGES, update.delta())
        wanted = model[2](torch.tanh(own))
    assert compare(adapted, wanted).ok
    assert compare(alone, wanted).relative > 1e-2


def test_a_slot_that_was_put_in_wrong_leaves_no_file(
    torch_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, kept = torch_file(Ragged(), ROWS, tmp_path / "base.onnx"), room.insert_slot

    def wrong(model: ir.Model, slot: Any, calls: Any) -> None:
        kept(model, slot, calls[:1])  # a second call of the layer goes without

    monkeypatch.setattr(room, "insert_slot", wrong)
    with pytest.raises((VerificationError, ExportError)):
        add_lora(base, tmp_path / "slots.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["base.onnx"]


def test_peft_s_own_directory_fits(torch_file: Any, tmp_path: Path) -> None:
    base = torch_file(Blocks(), torch.randn(4, 3), tmp_path / "base.onnx")
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


def test_a_second_call_with_an_equal_weight_takes_the_same_adapter(
    torch_file: Any, with_adapter: Any, eager: Any, tmp_path: Path
) -> None:
    """A weight that a tool stored once for each of its readers."""
    torch.manual_seed(0)
    model = Ragged()
    base = torch_file(model, ROWS, tmp_path / "base.onnx")
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
