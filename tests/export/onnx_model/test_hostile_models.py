"""Model files that a stranger wrote: a typed error, soon, that says what to do."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper
from torch import nn

from lora_fx.errors import ExportError, says_what_to_do
from lora_fx.export import (
    Session,
    add_lora,
    export_adapter,
    merge_onnx,
    quantize_onnx,
    to_onnx,
)
from lora_fx.export.onnx_model.digests import KEY as DIGESTS
from lora_fx.export.onnx_model.model_file import load_proto
from lora_fx.export.onnx_model.tensor_protos import byte_size, check_model, every_tensor
from lora_fx.frontend.trace import trace
from lora_fx.graph.example import NEW_CACHE
from lora_fx.report import diff
from lora_fx.testing import make_adapter

Change = Callable[[ModelProto], object]


@pytest.fixture(scope="module", params=["beside", "inside"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 65)).eval()
    above = 0 if request.param == "beside" else 1 << 30
    to_onnx(trace(model, (torch.randn(4, 7, 64),)), path, external_data_above=above)
    return path


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / "model.onnx"


def of(change: Callable[[TensorProto], object]) -> Change:
    """Changes the weight of the first layer."""
    return lambda model: change(max(model.graph.initializer, key=lambda t: len(t.dims)))


def typed(number: int) -> Change:
    return of(lambda tensor: setattr(tensor, "data_type", number))


def shaped(*sizes: int) -> Change:
    def change(tensor: TensorProto) -> None:
        tensor.dims[:] = sizes

    return of(change)


def external(tensor: TensorProto, **changed: str) -> TensorProto:
    """Makes a tensor external: 16 bytes of a file."""
    tensor.CopyFrom(TensorProto(name=tensor.name or "w", dims=[4], data_type=1, data_location=1))
    places = {"location": "model.onnx.data", "offset": "0", "length": "16"} | changed
    for key, value in places.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def placed(**changed: str) -> Change:
    return of(lambda tensor: external(tensor, **changed))


def in_attribute(model: ModelProto) -> None:
    node = model.graph.node.add(op_type="Constant", output=["c"])
    external(node.attribute.add(name="value", type=4).t, location="../secret")


def in_sparse_attribute(model: ModelProto) -> None:
    node = model.graph.node.add(op_type="Constant", output=["c"])
    external(node.attribute.add(name="sparse_value").sparse_tensor.values, location="/etc/passwd")


def in_function(model: ModelProto) -> None:
    function = model.functions.add(name="f", domain="d", output=["c"])
    function.opset_import.add(version=18)
    node = function.node.add(op_type="Constant", output=["c"])
    external(node.attribute.add(name="value", type=4).t, location="../secret")


def in_branch_without_nodes(model: ModelProto) -> None:
    node = model.graph.node.add(op_type="If", input=["x"], output=["c"])
    branch = node.attribute.add(name="then_branch", type=5).g
    external(branch.initializer.add(name="w"), location="../secret")


def in_default_of_function(model: ModelProto) -> None:
    function = model.functions.add(name="f", domain="d")
    external(function.attribute_proto.add(name="v", type=4).t, location="../secret")


def in_training(model: ModelProto) -> None:
    external(model.training_info.add().algorithm.initializer.add(name="w"), location="../secret")


def in_sparse_initializer(model: ModelProto) -> None:
    external(model.graph.sparse_initializer.add().indices, location="../secret")


def versions(model: ModelProto) -> None:
    model.opset_import[0].version = -3


def two_inputs(model: ModelProto) -> None:
    model.graph.input.append(model.graph.input[0])


def no_opset(model: ModelProto) -> None:
    model.opset_import[0].domain = "d"


def calls(*counts: int) -> Change:
    """A function that calls the one before it so often, the first itself or a plain operator."""

    def change(model: ModelProto) -> None:
        for level, count in enumerate(counts):
            below = max(level - 1, 0) if level or not count else None
            node = helper.make_node("Relu" if below is None else f"F{below}", ["x"], ["x"])
            node.domain = "" if below is None else "d"
            made = [node] * max(count, 1)
            opsets = [helper.make_opsetid("", 18), helper.make_opsetid("d", 1)]
            model.functions.append(
                helper.make_function("d", f"F{level}", ["x"], ["x"], made, opsets)
            )
        last = f"F{len(counts) - 1}"
        model.graph.node.append(helper.make_node(last, ["input"], ["of_calls"], domain="d"))
        model.opset_import.append(helper.make_opsetid("d", 1))

    return change


def half_a_number(model: ModelProto) -> None:
    model.metadata_props.add(key=NEW_CACHE, value="1e3")


MISMATCH = "its shape|overlap|data file|bytes"
CASES: dict[str, tuple[Change, str]] = {
    "type 0": (typed(0), "data type 0, expected one of ONNX's"),
    "type -7": (typed(-7), "data type -7, expected one of ONNX's"),
    "type 99": (typed(99), "data type 99, expected one of ONNX's"),
    "type 2 ** 31 - 1": (typed(2**31 - 1), "data type 2147483647, expected one of ONNX's"),
    "size -1": (shaped(-1, 64), r"shape \[-1, 64\], expected sizes of 0 or more"),
    "sizes without end": (shaped(1 << 40, 1 << 40), "expected sizes of 0 or more whose product"),
    "many sizes": (shaped(*[2] * 70), "expected sizes of 0 or more whose product"),
    "more than there is": (shaped(1 << 40), MISMATCH),
    "offset of 5,000 digits": (placed(offset="9" * 5000), "expected whole numbers of at most 18"),
    "length of 5,000 digits": (placed(length="1" * 5000), "expected whole numbers of at most 18"),
    "offset -1": (placed(offset="-1"), "offset '-1', .*expected whole numbers"),
    "offset not ASCII": (placed(offset="١٢"), "expected whole numbers"),
    "offset squared": (placed(offset="²"), "expected whole numbers"),
    "offset of nothing": (placed(offset=""), "expected whole numbers"),
    "offset of two lines": (placed(offset="0\n"), "expected whole numbers"),
    "location NUL": (placed(location="a\0b"), "expected the name of a file"),
    "location too long": (placed(location="n" * 5000), "its data file n+: File name too long"),
    "IR version 0": (lambda m: setattr(m, "ir_version", 0), "IR version 0, expected 3 or more"),
    "IR version -1": (lambda m: setattr(m, "ir_version", -1), "IR version -1, expected 3"),
    "no IR version": (lambda m: m.ClearField("ir_version"), "IR version 0, expected 3 or more"),
    "IR version of tomorrow": (lambda m: setattr(m, "ir_version", 1 << 62), "ersion"),
    "opset -3": (versions, "opset version -3 of '', expected 1 or more"),
    "no opset": (no_opset, "says no version of ONNX's own operators, .*export it again"),
    "an input twice": (two_inputs, "two inputs of one name: input: export it again"),
    "a function of itself": (calls(0), r"functions that call themselves: d\.F0, d\.F0"),
    "calls without end": (calls(*[2] * 60), "functions that stand for more than 1000000 nodes"),
    "a note": (half_a_number, "new_cache_behind is '1e3', expected a number|not what was exported"),
    "in an attribute": (in_attribute, "'../secret': expected the name of a file"),
    "in a sparse attribute": (in_sparse_attribute, "'/etc/passwd': expected the name of a file"),
    "in a function": (in_function, "'../secret': expected the name of a file"),
    "in a default": (in_default_of_function, "'../secret': expected the name of a file"),
    "in a branch": (in_branch_without_nodes, "'../secret': expected the name of a file"),
    "in training": (in_training, "'../secret': expected the name of a file"),
    "sparse": (in_sparse_initializer, "'../secret': expected the name of a file"),
}


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_hostile_model_is_refused_soon(case: str, check: bool, model: Path) -> None:
    change, message = CASES[case]
    proto = onnx.load(model, load_external_data=False)
    change(proto)
    model.write_bytes(proto.SerializeToString())
    begin = time.perf_counter()
    with pytest.raises(ExportError, match=rf"model\.onnx: .*({message})"):
        Session(model, check=check)
    assert time.perf_counter() - begin < 2


def test_a_second_tensor_of_a_name_does_not_hide_behind_the_digest_of_the_first(
    model: Path,
) -> None:
    proto = onnx.load(model, load_external_data=False)
    proto.graph.initializer.add().CopyFrom(proto.graph.initializer[0])
    if proto.graph.initializer[0].external_data:
        shutil.copy(model.with_name("model.onnx.data"), model.with_name("other"))
        proto.graph.initializer[-1].external_data[0].value = "other"
    model.write_bytes(proto.SerializeToString())
    with pytest.raises(ExportError, match="two tensors of one name"):
        Session(model)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("of", ["a node's", "a tensor's", "the graph's"])
def test_a_name_that_is_not_utf8_is_refused(of: str, check: bool, model: Path) -> None:
    graph = onnx.load(model, load_external_data=False).graph
    names = {"a node's": graph.node[0].name, "a tensor's": graph.initializer[0].name}
    name = names.get(of, graph.input[0].name).encode()
    damaged = name[:-1] + b"\xff"
    length = len(name).to_bytes()
    model.write_bytes(model.read_bytes().replace(length + name, length + damaged, 1))
    with pytest.raises(ExportError, match=r"model\.onnx: the name b'.*' is not UTF-8"):
        Session(model, check=check)


def test_digests_may_be_nested_without_end(model: Path) -> None:
    proto = onnx.load(model, load_external_data=False)
    next(e for e in proto.metadata_props if e.key == DIGESTS).value = "[" * 50_000 + "]" * 50_000
    model.write_bytes(proto.SerializeToString())
    with pytest.raises(ExportError, match=r"model\.onnx: lora_fx\.digests: not JSON"):
        Session(model)


@pytest.mark.parametrize(
    "behind", [b"\0", bytes(5000), b"\x07", b"\x3a\xff\xff\xff\x7f", b"\xff" * 20]
)
def test_what_lies_behind_a_model_is_refused_unread(
    behind: bytes, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = model.stat().st_size
    model.write_bytes(model.read_bytes() + behind)
    monkeypatch.setattr(onnx, "load", None)  # not called
    with pytest.raises(ExportError, match=rf"not an ONNX file: byte {size} begins no field"):
        load_proto(model)


def test_a_graph_that_is_none_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.onnx").write_bytes(b"\x08\x0a\x3a\xe8\x07" + bytes(1000))
    monkeypatch.setattr(onnx, "load", None)  # not called
    with pytest.raises(ExportError, match="not an ONNX file: byte 5 begins no field"):
        load_proto(tmp_path / "x.onnx")


def test_every_type_that_onnx_has_is_let_through() -> None:
    model = ModelProto(ir_version=10)
    model.opset_import.add(version=20)
    for name, number in TensorProto.DataType.items():
        if name == "STRING":
            model.graph.initializer.add(name=name, dims=[3], data_type=8, string_data=[b"a"] * 3)
        elif name != "UNDEFINED":
            tensor = model.graph.initializer.add(name=name, dims=[3], data_type=number)
            tensor.raw_data = bytes(byte_size(tensor))
    model.graph.initializer.add(name="int4", dims=[5], data_type=22, int32_data=[1, 2, 3])
    model.graph.initializer.add(name="none", dims=[0], data_type=1)
    assert len(list(every_tensor(model))) == len(TensorProto.DataType.items()) + 1
    check_model(model)


ADAPTER = make_adapter({"0": (6, 4)})
# What reads a file, whether with slots, and how.
READERS: dict[str, tuple[bool, Callable[[Path, Path], object]]] = {
    "a session": (True, lambda model, out: Session(model)),
    "an adapter's file": (True, lambda model, out: export_adapter(ADAPTER, model, out)),
    "a merge": (True, lambda model, out: merge_onnx(model, ADAPTER, out)),
    "slots": (False, lambda model, out: add_lora(model, out)),
    "few bits": (False, lambda model, out: quantize_onnx(model, out)),
    "a difference": (False, lambda model, out: diff(model, model)),
}


def test_a_graph_that_goes_in_a_circle_is_refused(tmp_path: Path) -> None:
    graph = onnx.parser.parse_graph(
        "g (float[2, 2] x) => (float[2, 2] y) <float[2, 2] w = {1, 2, 3, 4}>"
        "{ a = Add(x, y)  y = MatMul(a, w) }"
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="not a valid ONNX graph: Graph contains a cycle"):
        add_lora(tmp_path / "model.onnx", tmp_path / "out.onnx")


@pytest.mark.parametrize("reader", READERS)
def test_a_graph_that_says_one_value_twice_is_refused(reader: str, tmp_path: Path) -> None:
    """Without what we note in a file, which would tell; slots are found by their names then."""
    path, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    has_slots, read = READERS[reader]
    gm = trace(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5)).eval(), (torch.randn(2, 4),))
    to_onnx(gm, path, adapters="input" if has_slots else "constant", verify=False)
    file = onnx.load(path)
    del file.metadata_props[:]
    file.graph.node.append(file.graph.node[-1])
    path.write_bytes(file.SerializeToString())
    with pytest.raises(ExportError, match=r"model\.onnx: .*redeclared") as refused:
        read(path, out)
    assert says_what_to_do(str(refused.value))
    assert not out.exists()


def test_what_no_tool_runs_is_told_by_onnxruntime_where_it_cannot_be_read(
    model: Path, tmp_path: Path
) -> None:
    file, out = tmp_path / "changed.onnx", tmp_path / "out.onnx"
    quantize_onnx(model, file, layers=["0"], external_data_above=1 << 30)
    proto = onnx.load(file)
    del proto.metadata_props[:]
    del next(node for node in proto.graph.node if node.op_type == "MatMulNBits").input[2:]
    onnx.save(proto, file)
    for call in (add_lora, quantize_onnx):
        with pytest.raises(ExportError, match=r"changed\.onnx: not loaded by onnx.*; give the f"):
            call(file, out)
    assert not out.exists()
