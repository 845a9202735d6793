"""Files that are not what was exported are refused by everything that reads them."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import fx, nn

from lora_fx import fold, inject
from lora_fx.adapters.adapter import Adapter, Update
from lora_fx.cli.inspect import describe
from lora_fx.errors import ExportError
from lora_fx.export import Session, export_adapter, to_onnx, verify_onnx
from lora_fx.export.onnx_model.digests import KEY
from lora_fx.export.slots.manifest import KEY as SLOTS
from lora_fx.export.slots.manifest import Manifest
from lora_fx.export.slots.slot import Slot
from lora_fx.frontend.trace import trace
from lora_fx.graph.lazy_tensor import get_unevaluated

DATA = "model.onnx.data"


class Base(nn.Module):
    """Two layers of one shape, and constants that are no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(40, 40), nn.Linear(40, 40)
        self.norm = nn.LayerNorm(40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.two(torch.relu(self.one(x))))


@functools.cache
def graph(seed: int) -> fx.GraphModule:
    """Of one seed: only read."""
    torch.manual_seed(seed)
    return trace(Base().eval(), (torch.randn(4, 40),))


def adapter() -> Adapter:
    return Adapter("a", {"one": Update(torch.randn(2, 40), torch.randn(40, 2), 0.1)})


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, mode, limit, seed in (
        ("external", "input", 0, 0),
        ("inline", "input", 10**9, 0),
        ("merged", "constant", 0, 0),
        ("other", "input", 0, 1),
    ):
        found[name] = tmp_path_factory.mktemp(name)
        file = found[name] / "model.onnx"
        to_onnx(graph(seed), file, adapters=mode, external_data_above=limit)
    return found


@pytest.fixture
def copy(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        shutil.copytree(originals[name], tmp_path / name)
        return tmp_path / name / "model.onnx"

    return make


def readers(model: Path) -> dict[str, Callable[[], Any]]:
    """All that reads a file and says something about it."""
    out = model.with_name("a.onnx_adapter")
    return {
        "session": lambda: Session(model),
        "verify": lambda: verify_onnx(graph(0), model),
        "inspect": lambda: describe(model),
        "export_adapter": lambda: export_adapter(adapter(), model, out, force=True),
    }


def refused(model: Path, reason: str) -> None:
    swappable = SLOTS in metadata(model)
    for name, read in readers(model).items():
        if name != "export_adapter" or swappable:
            with pytest.raises(ExportError, match=reason):
                read()
    assert not model.with_name("a.onnx_adapter").exists()


def edit(model: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    proto = onnx.load(model, load_external_data=False)
    change(proto)
    model.write_bytes(proto.SerializeToString())


def metadata(model: Path) -> dict[str, str]:
    proto = onnx.load(model, load_external_data=False)
    return {entry.key: entry.value for entry in proto.metadata_props}


def tensor(proto: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(t for t in proto.graph.initializer if t.name == name)


@pytest.mark.parametrize("name", ["external", "inline", "merged"])
def test_what_was_exported_is_read(copy: Callable[[str], Path], name: str) -> None:
    model = copy(name)
    for what, read in readers(model).items():
        if what != "export_adapter" or name != "merged":
            read()


def _exchange_places(model: Path) -> None:
    def change(proto: onnx.ModelProto) -> None:
        one, two = tensor(proto, "one.weight"), tensor(proto, "two.weight")
        held = list(one.external_data)
        del one.external_data[:]
        one.external_data.extend(two.external_data)
        del two.external_data[:]
        two.external_data.extend(held)

    edit(model, change)


def _shift(model: Path) -> None:
    data = model.with_name(DATA)
    data.write_bytes(data.read_bytes()[4:] + b"\0" * 4)


def _scale(model: Path) -> None:
    values = np.fromfile(model.with_name(DATA), np.float32)
    (values * np.float32(1.1)).tofile(model.with_name(DATA))


@pytest.mark.parametrize("name", ["external", "merged"])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_exchange_places, "other values in one.weight, two.weight: "),
        (_shift, "other values in "),
        (_scale, "other values in .*one.weight"),
    ],
)
def test_other_external_data_is_refused(
    copy: Callable[[str], Path], name: str, spoil: Callable[[Path], None], reason: str
) -> None:
    model = copy(name)
    spoil(model)
    refused(model, rf"model\.onnx: not what was exported: .*{reason}.*export again")


def test_the_data_of_another_base_is_refused(
    copy: Callable[[str], Path], originals: dict[str, Path]
) -> None:
    model = copy("external")
    shutil.copy(originals["other"] / DATA, model.with_name(DATA))
    refused(model, "other values in .*one.weight, two.weight")


def _inline_weight(proto: onnx.ModelProto) -> None:
    held = tensor(proto, "two.weight")
    held.raw_data = (numpy_helper.to_array(held) * np.float32(1.1)).tobytes()


def _inline_bias(proto: onnx.ModelProto) -> None:
    tensor(proto, "norm.bias").raw_data = np.full(40, 0.01, np.float32).tobytes()


def _transposed(proto: onnx.ModelProto) -> None:
    held = tensor(proto, "one.weight")
    held.raw_data = np.ascontiguousarray(numpy_helper.to_array(held).T).tobytes()


def _renamed(proto: onnx.ModelProto) -> None:
    held = tensor(proto, "norm.weight")
    held.name = "scale"
    for node in proto.graph.node:
        node.input[:] = ["scale" if name == "norm.weight" else name for name in node.input]


def _relu_gone(proto: onnx.ModelProto) -> None:
    next(node for node in proto.graph.node if node.op_type == "Relu").op_type = "Identity"


def _exchanged_readers(proto: onnx.ModelProto) -> None:
    swap = {"one.weight": "two.weight", "two.weight": "one.weight"}
    for node in proto.graph.node:
        node.input[:] = [swap.get(name, name) for name in node.input]


def _exchanged_slot_digests(proto: onnx.ModelProto) -> None:
    entry = next(e for e in proto.metadata_props if e.key == SLOTS)
    values = json.loads(entry.value)
    one, two = values["slots"]
    one["digest"], two["digest"] = two["digest"], one["digest"]
    slots = tuple(Slot(**{k: v for k, v in s.items() if k != "inputs"}) for s in (one, two))
    values["base"] = Manifest(slots).base
    entry.value = json.dumps(values, sort_keys=True, separators=(",", ":"))


def _exchanged_weights_and_digests(proto: onnx.ModelProto) -> None:
    one, two = tensor(proto, "one.weight"), tensor(proto, "two.weight")
    one.raw_data, two.raw_data = two.raw_data, one.raw_data
    entry = next(e for e in proto.metadata_props if e.key == KEY)
    values = json.loads(entry.value)
    held = values["tensors"]
    held["one.weight"], held["two.weight"] = held["two.weight"], held["one.weight"]
    entry.value = json.dumps(values)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_inline_weight, "other values in two.weight: "),
        (_inline_bias, "other values in norm.bias: "),
        (_transposed, "other values in one.weight: "),
        (_renamed, "lacks norm.weight; has besides scale; its graph was rewritten: "),
        (_relu_gone, "its graph was rewritten: "),
        (_exchanged_readers, "its graph was rewritten: "),
        (_exchanged_slot_digests, "its manifest or lora_fx.new_cache_behind was changed: "),
        (_exchanged_weights_and_digests, "its manifest or lora_fx.new_cache_behind was changed: "),
    ],
)
def test_another_model_file_is_refused(
    copy: Callable[[str], Path], change: Callable[[onnx.ModelProto], None], reason: str
) -> None:
    model = copy("inline")
    edit(model, change)
    refused(model, rf"model\.onnx: not what was exported: {reason}")


def _dropped(proto: onnx.ModelProto) -> None:
    kept = [value for value in proto.graph.input if value.name != "one.lora_B"]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)


def _without_default(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.remove(tensor(proto, "one.lora_B"))


def _inputs_all(proto: onnx.ModelProto) -> None:
    proto.ir_version = 3  # where every weight is an input, and none a default


def _unlisted(proto: onnx.ModelProto) -> None:
    entry = next(e for e in proto.metadata_props if e.key == SLOTS)
    values = json.loads(entry.value)
    left = Slot(**{k: v for k, v in values["slots"][1].items() if k != "inputs"})
    entry.value = Manifest((replace(left, kernel=()),)).to_json()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_dropped, "for the slots one.lora_B: another tool"),
        (_without_default, "for the slots one.lora_B: another tool"),
        (_inputs_all, "for the slots one.lora_A, one.lora_B"),
        (_unlisted, "its graph has inputs one.lora_A, one.lora_B that its manifest does not list"),
    ],
)
@pytest.mark.parametrize("digests", [True, False])
def test_slots_are_those_of_the_manifest(
    copy: Callable[[str], Path],
    change: Callable[[onnx.ModelProto], None],
    reason: str,
    digests: bool,
) -> None:
    model = copy("inline")
    edit(model, change)
    if not digests:  # a file of an earlier version
        edit(model, _without_digests)
    refused(model, reason)
    with pytest.raises(ExportError, match=reason):
        Session(model, check=False)


def _without_digests(proto: onnx.ModelProto) -> None:
    proto.metadata_props.remove(next(e for e in proto.metadata_props if e.key == KEY))


def test_a_changed_file_runs_where_that_is_asked_for(copy: Callable[[str], Path]) -> None:
    model = copy("inline")
    x = {"x": torch.ones(4, 40)}
    before = Session(model).run(x)["output"]
    edit(model, _inline_bias)
    after = Session(model, check=False).run(x)["output"]
    assert not np.allclose(before, after)
    export_adapter(adapter(), model, model.with_name("a.onnx_adapter"), check=False)
    edit(model, _without_digests)
    assert np.array_equal(Session(model).run(x)["output"], after)


def test_the_tool_that_wrote_last_is_named(copy: Callable[[str], Path]) -> None:
    model = copy("merged")

    def quantised(proto: onnx.ModelProto) -> None:
        _relu_gone(proto)
        proto.producer_name = "onnx.quantize"

    edit(model, quantised)
    refused(model, "last written by 'onnx.quantize'.*quantiser or another tool.*check=False")


def test_what_changes_no_result_is_let_be(copy: Callable[[str], Path]) -> None:
    model = copy("inline")
    proto = onnx.shape_inference.infer_shapes(onnx.load(model))
    proto.metadata_props.add(key="author", value="somebody")
    proto.doc_string = "a model"
    where = {"location": "moved.data", "size_threshold": 40}  # what is empty stays
    onnx.save(proto, model, save_as_external_data=True, **where)
    assert model.with_name("moved.data").exists()
    for read in readers(model).values():
        read()
    values = np.fromfile(model.with_name("moved.data"), np.float32)
    (values * np.float32(1.1)).tofile(model.with_name("moved.data"))
    with pytest.raises(ExportError, match="other values in"):
        Session(model)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "not JSON .*holds a list"),
        ('{"version":1,"graph":"a","whole":"b"}', "unknown or missing fields"),
        ('{"version":1,"graph":"a","whole":"b","tensors":{"c":3}}', "unknown or missing fields"),
        ('{"version":1,"graph":"a","whole":"b","tensors":{}}', "not what was exported: lacks|has"),
    ],
)
def test_damaged_digests_are_refused(copy: Callable[[str], Path], text: str, reason: str) -> None:
    def change(proto: onnx.ModelProto) -> None:
        next(e for e in proto.metadata_props if e.key == KEY).value = text

    model = copy("inline")
    edit(model, change)
    refused(model, reason)


def test_each_weight_is_computed_once_and_digested_as_it_is_written(tmp_path: Path) -> None:
    gm = fold(inject(graph(0), adapter()))
    calls = []
    held = get_unevaluated(gm, "one.weight")
    make = held.evaluate
    held.evaluate = lambda: (calls.append(1), make())[1]
    to_onnx(gm, tmp_path / "model.onnx", verify=False, external_data_above=0)
    assert calls == [1]
    digests = json.loads(metadata(tmp_path / "model.onnx")[KEY])["tensors"]
    stored = numpy_helper.to_array(tensor(onnx.load(tmp_path / "model.onnx"), "one.weight"))
    assert np.array_equal(stored, make().numpy())
    content = b"1:(40, 40):" + stored.tobytes()
    assert digests["one.weight"] == hashlib.sha256(content).hexdigest()[:32]
