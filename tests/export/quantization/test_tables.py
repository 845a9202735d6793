"""Tables in a few bits, and the heads that share their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import fx, nn

import lora_fx
from lora_fx.adapters.adapter import Adapter
from lora_fx.errors import ExportError, VerificationError
from lora_fx.export import (
    Session,
    add_lora,
    export_adapter,
    merge_onnx,
    quantize_onnx,
    verify_onnx,
)
from lora_fx.export.onnx_model.model_file import load_proto, manifest_in
from lora_fx.export.quantization.choose_layers import choose_layers
from lora_fx.export.quantization.numbers import packed_in, with_numbers
from lora_fx.export.rewriting.file_layers import layers_in
from lora_fx.testing import make_adapter
from lora_fx.testing.judge import relative

SOURCE = torch.Generator().manual_seed(3)
IDS = torch.tensor([[1, 5, 2], [3, 3, 18]])


class TiedHead(nn.Module):
    """A head whose weight is the table's."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(19, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 19, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.table(ids) + self.table(ids.flip(1))  # twice, as T5's encoder and decoder do
        y: torch.Tensor = self.head(hidden + self.fc(hidden))
        return y


def exported(path: Path, **options: Any) -> fx.GraphModule:
    torch.manual_seed(0)
    gm = lora_fx.trace(TiedHead().eval(), (IDS,), dynamic_shapes=({0: "batch"},))
    lora_fx.to_onnx(gm, path, **options)
    return gm


# Which linear layers and tables are quantised of a `TiedHead`, which are, and what is left.
TIED: dict[str, tuple[dict[str, Any], set[str]]] = {
    "neither": ({}, {"fc"}),
    "head": ({"layers": ["*"]}, {"fc", "head"}),
    "table": ({"tables": ["table"]}, {"fc", "table"}),
    "both": ({"layers": ["*"], "tables": ["*"]}, {"fc", "head", "table"}),
    "both in 8 bits": ({"layers": ["*"], "tables": ["*"], "bits": 8}, {"fc", "head", "table"}),
    "symmetric": ({"layers": ["*"], "tables": ["*"], "symmetric": True}, {"fc", "head", "table"}),
}


@pytest.mark.parametrize("mode", ["constant", "input"])
@pytest.mark.parametrize("what", TIED)
def test_a_head_and_a_table_of_one_weight_take_bits_together_or_alone(
    what: str, mode: str, tmp_path: Path
) -> None:
    plain, packed = tmp_path / "plain.onnx", tmp_path / "packed.onnx"
    slots = {"slots": ["table", "fc", "head"]} if mode == "input" else {}
    gm = exported(plain, adapters=mode, **slots)
    options, wanted = TIED[what]
    report = quantize_onnx(plain, packed, **options)
    assert report.verified
    assert set(report.quantised.weights) == wanted
    graph = onnx.load(packed).graph
    stored = [t for t in graph.initializer if t.dims[0] == 19 and ".lora_" not in t.name]
    own = gm.get_parameter("head.weight").detach()
    plain_ones = [numpy_helper.to_array(t) for t in stored if t.name.endswith(".weight")]
    assert [bool(np.array_equal(array, own)) for array in plain_ones] == (
        [] if {"head", "table"} < wanted else [True]
    )
    assert sum("_Q" in tensor.name for tensor in stored) == (len(wanted) > 1)
    assert report.quantised.left == ({} if "head" in wanted else {"head": "a head"})
    shapes = {"table": (32, 19), "fc": (32, 32), "head": (19, 32)}
    adapters = [make_adapter(shapes)] if slots else []
    assert verify_onnx(gm, packed, adapters=adapters).verified
    of_base, of_numbers = (manifest_in(load_proto(path), path) for path in (plain, packed))
    if of_base is not None and of_numbers is not None:
        pairs = zip(of_base.slots, of_numbers.slots, strict=True)
        assert {a.path for a, b in pairs if a.digest != b.digest} == wanted
    numbers, errors = with_numbers(gm, packed_in(packed))
    assert set(errors) == wanted
    assert all(1e-3 < off < 0.2 for off in errors.values())
    found = torch.from_numpy(Session(packed).run({"ids": IDS.numpy()})["output"])
    with torch.no_grad():
        assert relative(found, numbers(IDS)) < 1e-5
        assert relative(found, gm(IDS)) > 1e-3
        if "8" not in what:
            assert relative(found, gm(IDS)) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_lookup_gives_the_rows_that_the_bytes_stand_for(
    bits: Literal[4, 8], dtype: torch.dtype, tmp_path: Path
) -> None:
    """As the operator is defined: from its bytes alone, ids that count from the end too."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(19, 48), nn.Linear(48, 5)).eval().to(dtype)
    gm = lora_fx.trace(net, (IDS,), dynamic_shapes=({0: "batch"},))
    lora_fx.to_onnx(gm, tmp_path / "a.onnx")
    quantize_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx", bits=bits, tables=["0"], block_size=16)
    model = onnx.load(tmp_path / "b.onnx")
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    (node,) = (n for n in model.graph.node if n.op_type == "GatherBlockQuantized")
    scales, zeros = (held[name] for name in node.input[2:])
    packed = held[node.input[0]]  # as stored: what no head reads needs no Reshape in front
    codes = np.unpackbits(packed.reshape(19, -1), axis=1, bitorder="little").reshape(19, -1, bits)
    middles = np.unpackbits(zeros, axis=1, bitorder="little").reshape(19, -1, bits)[:, :3]
    powers = 2 ** np.arange(bits)
    away = codes @ powers - np.repeat(middles @ powers, 16, 1).astype(np.float32)
    rows = (away * np.repeat(scales.astype(np.float32), 16, 1)).astype(scales.dtype)
    model.graph.output.append(onnx.ValueInfoProto(name=node.output[0]))
    session = ort.InferenceSession(model.SerializeToString())
    found = session.run([node.output[0]], {model.graph.input[0].name: IDS.numpy() - 19})[0]
    assert np.array_equal(found, rows[IDS.numpy()])
    gap = np.abs(found - net[0].weight.detach().numpy()[IDS])
    assert 0 < gap.max() < np.abs(scales).max() * 1.01


# What is quantised, and why the table stays.
LEFT: dict[str, tuple[dict[str, Any], str]] = {
    "no lookup in tables": ({"bits": "nf4"}, "onnxruntime looks up no rows of 32 in nf4"),
    "no whole blocks": ({"block_size": 64}, "looks up no rows of 32 in 4 bits in blocks of 64"),
    "kept": ({"keep": ["tab*"]}, "asked for"),
}


def test_numbers_of_another_model_are_refused(tmp_path: Path) -> None:
    exported(tmp_path / "a.onnx")
    quantize_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx", verify=False)
    other = lora_fx.trace(nn.Sequential(nn.Embedding(19, 32), nn.Linear(32, 32)), (IDS,))
    with pytest.raises(VerificationError, match=r"\.weight: quantised, and no weight of the model"):
        with_numbers(other, packed_in(tmp_path / "b.onnx"))


@pytest.mark.parametrize("what", LEFT)
def test_a_table_stays_where_no_lookup_takes_its_bits(what: str, tmp_path: Path) -> None:
    gm = exported(tmp_path / "a.onnx")
    options, why = LEFT[what]
    report = quantize_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx", tables=["*"], **options)
    assert set(report.quantised.weights) == {"fc"}
    assert why in report.quantised.left["table"]
    assert verify_onnx(gm, tmp_path / "b.onnx").verified


def test_a_table_and_its_head_are_compared_whatever_a_file_calls_its_values(tmp_path: Path) -> None:
    exported(tmp_path / "a.onnx")
    model = onnx.load(tmp_path / "a.onnx")
    (lookup, *_) = (n for n in model.graph.node if n.op_type == "Gather")
    before, after = lookup.output[0], f"{lookup.input[0]}_table"
    for node in model.graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = after if name == before else name
    del model.metadata_props[:]  # as another tool's
    onnx.save(model, tmp_path / "other.onnx")
    report = quantize_onnx(tmp_path / "other.onnx", tmp_path / "b.onnx", layers=["*"])
    assert report.verified
    assert len(report.quantised.weights) == 2  # the table stays


def test_a_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    exported(tmp_path / "a.onnx")
    with pytest.raises(ExportError, match="layers: names no layer; there are fc, head"):
        quantize_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx", layers=[])
    with pytest.raises(ExportError, match=r"no embedding at head; there are table"):
        quantize_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx", tables=["head"])
    assert not (tmp_path / "b.onnx").exists()


def test_slots_stand_beside_a_table_in_bits(tmp_path: Path) -> None:
    gm = exported(tmp_path / "a.onnx")
    quantize_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx", layers=["*"], tables=["*"])
    report = add_lora(tmp_path / "b.onnx", tmp_path / "c.onnx", slots=["table", "head"])
    assert report.verified
    assert not any("without an adapter" in note for note in report.notes)
    adapter = make_adapter({"table": (32, 19), "head": (19, 32)})
    export_adapter(adapter, tmp_path / "c.onnx", tmp_path / "c.onnx_adapter")
    session = Session(tmp_path / "c.onnx")
    found = session.run({"ids": IDS.numpy()}, tmp_path / "c.onnx_adapter")["output"]
    numbers = with_numbers(gm, packed_in(tmp_path / "b.onnx"))[0]
    with torch.no_grad():
        expected, bare = lora_fx.inject(numbers, adapter)(IDS), numbers(IDS)
    assert relative(torch.from_numpy(found), expected) < 1e-5
    assert relative(torch.from_numpy(found), bare) > 0.1


@pytest.mark.parametrize("folded", [True, False])
def test_a_file_is_held_to_the_graph_that_it_was_made_of_folded_or_not(
    folded: bool, tmp_path: Path
) -> None:
    gm = lora_fx.trace(TiedHead().eval(), (IDS,))  # x + W x, of which fold makes one layer
    made = lora_fx.fold(gm) if folded else gm
    lora_fx.to_onnx(made, tmp_path / "a.onnx", quantize=4)
    assert verify_onnx(gm, tmp_path / "a.onnx").verified
    other = lora_fx.trace(TiedHead().eval(), (IDS,))
    with pytest.raises(VerificationError, match=r"fc\.weight: .* weights are off"):
        verify_onnx(other, tmp_path / "a.onnx")


@pytest.mark.parametrize("on", ["table", "head", "a new head"])
def test_what_ties_is_merged_with_its_adapter_and_quantised(on: str, tmp_path: Path) -> None:
    """Head and table part: the names of their weights are a file's own, and not the graph's."""
    plain, merged, folded = (tmp_path / f"{name}.onnx" for name in ("a", "b", "c"))
    shape = (32, 19) if on == "table" else (19, 32)
    adapter, other = (make_adapter({on: shape}, rank) for rank in (2, 3))
    if on == "a new head":
        heads = (torch.randn(19, 32, generator=SOURCE) for _ in range(2))
        adapter, other = (Adapter("new", {}, {"head.weight": head}) for head in heads)
    slots = ["table", "fc", "head.weight" if on == "a new head" else "head"]
    gm = exported(plain, adapters="input", slots=slots)
    merge_onnx(plain, adapter, merged)
    whole = lora_fx.fold(lora_fx.inject(gm, adapter))
    lora_fx.to_onnx(whole, folded)
    for number, file in enumerate((merged, folded)):
        packed = tmp_path / f"{number}.onnx"
        report = quantize_onnx(file, packed, layers=["*"])
        assert len(report.quantised.weights) == 2
        assert verify_onnx(gm, packed, adapters=[adapter]).verified
        for wrong in ([], [other]):
            with pytest.raises(VerificationError):
                verify_onnx(gm, packed, adapters=wrong)
    before = [node.meta.keys() for node in whole.graph.nodes]
    numbers, _ = with_numbers(whole, packed_in(packed))
    assert numbers is not whole
    assert [node.meta.keys() for node in whole.graph.nodes] == before
    assert lora_fx.unfold(whole).code


class ReadBothWays(nn.Module):
    """A table that is looked up, and that weighs its own rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(32, 64), nn.Linear(64, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.fc(self.table(ids)).softmax(-1) @ self.table.weight


def test_a_table_that_is_multiplied_by_turned_round_has_bits_for_one_of_the_two(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    gm = lora_fx.trace(ReadBothWays().eval(), (IDS,))
    lora_fx.to_onnx(gm, tmp_path / "a.onnx")
    report = quantize_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx", layers=["*"], tables=["*"])
    assert report.verified
    assert "table" in report.quantised.weights
    (why,) = report.quantised.left.values()
    assert why == "its weight is read turned round too"
    assert verify_onnx(gm, tmp_path / "b.onnx").verified


# Attributes of a lookup in 19 rows of 32 numbers, and whether it is a layer.
LOOKUPS: dict[str, tuple[dict[str, int], bool]] = {
    "of rows": ({"gather_axis": 0, "quantize_axis": 1}, True),
    "its axes counted from the end": ({"quantize_axis": -1}, True),
    "of columns": ({"gather_axis": 1, "quantize_axis": 1}, False),
    "in blocks of rows": ({"gather_axis": 0, "quantize_axis": 0}, False),
}


@pytest.mark.parametrize("what", LOOKUPS)
def test_a_lookup_of_rows_in_blocks_of_each_is_a_layer(what: str) -> None:
    attributes, is_layer = LOOKUPS[what]
    arrays = (np.zeros((19, 16), np.uint8), np.ones((19, 1), np.float32))
    values = [ir.val(f"t{n}", const_value=ir.tensor(array)) for n, array in enumerate(arrays)]
    ids = ir.val("ids", ir.DataType.INT64, (2,))
    node = ir.node(
        "GatherBlockQuantized", [values[0], ids, values[1]],
        {"bits": 4, "block_size": 32, **attributes}, domain="com.microsoft",
    )  # fmt: skip
    graph = ir.Graph([ids], node.outputs, nodes=[node], initializers=values, opset_imports={"": 20})
    found = [(layer.kind, layer.shape) for layer in layers_in(ir.Model(graph, ir_version=10))]
    assert found == ([("embedding", (32, 19))] if is_layer else [])


@pytest.mark.parametrize("name", ["ones", "fc.lora_B"])
def test_columns_beside_x_are_an_adapter_s_by_their_name_alone(name: str) -> None:
    h = onnx.helper
    nodes = [h.make_node("Concat", ["x", name], ["w"], axis=1), h.make_node("MatMul", "wa", "y")]
    nodes.append(h.make_node("Relu", "y", "z"))
    x, z = (h.make_tensor_value_info(n, 1, [2, s]) for n, s in (("x", 30), ("z", 5)))
    held = {name: np.ones((2, 2), np.float32), "a": np.ones((32, 5), np.float32)}
    graph = h.make_graph(
        nodes, "g", [x], [z], [numpy_helper.from_array(v, n) for n, v in held.items()]
    )
    chosen = choose_layers(ir.from_proto(h.make_model(graph)), ["*"])
    assert bool(chosen.layers) == (name == "ones")
    assert bool(chosen.left) == (name != "ones")
