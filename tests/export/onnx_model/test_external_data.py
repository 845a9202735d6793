from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from lora_fx.errors import ExportError
from lora_fx.export import Session, add_lora, to_onnx
from lora_fx.frontend.trace import trace


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("external") / "model.onnx"
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 65)).eval()
    to_onnx(trace(model, (torch.randn(4, 7, 64),)), path, external_data_above=0)
    return path


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / "model.onnx"


def rewrite(model: Path, key: str, value: str, tensor: int = 0) -> None:
    proto = onnx.load(model, load_external_data=False)
    entries = [t for t in proto.graph.initializer if t.external_data][tensor].external_data
    entry = next((e for e in entries if e.key == key), None) or entries.add(key=key)
    entry.value = value
    model.write_bytes(proto.SerializeToString())


def test_a_model_with_its_own_data_runs(model: Path) -> None:
    found = Session(model).run({"input": torch.zeros(4, 7, 64)})
    assert found["output"].shape == (4, 7, 65)


def test_a_file_for_each_tensor_begins_with_it(model: Path) -> None:
    """TorchScript's exporter says of it no more than its name."""
    x = {"input": torch.randn(4, 7, 64)}
    wanted = Session(model).run(x)["output"]
    proto = onnx.load(model)
    for number, tensor in enumerate(proto.graph.initializer):
        if tensor.HasField("raw_data") and len(tensor.raw_data) > 1024:
            model.with_name(f"part {number}").write_bytes(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=f"part {number}")
    model.write_bytes(proto.SerializeToString())
    assert model.with_name("part 0").exists()
    assert (Session(model).run(x)["output"] == wanted).all()
    model.with_name("part 0").write_bytes(b"less")
    with pytest.raises(ExportError, match="the data file is truncated"):
        Session(model)


def test_data_beside_a_model_may_be_said_to_be_in_its_directory(model: Path) -> None:
    """Which a location, a path, may say; ranges of one file may not overlap, however it is said."""
    x = {"input": torch.randn(4, 7, 64)}
    wanted = Session(model).run(x)["output"]
    rewrite(model, "location", "./model.onnx.data")
    assert (Session(model).run(x)["output"] == wanted).all()
    rewrite(model, "offset", "0", tensor=1)
    with pytest.raises(ExportError, match=r"overlap in model\.onnx\.data"):
        Session(model)


def test_data_may_lie_below_a_model(model: Path, tmp_path: Path) -> None:
    x = {"input": torch.randn(4, 7, 64)}
    wanted = Session(model).run(x)["output"]
    below = model.with_name("data")
    below.mkdir()
    model.with_name("model.onnx.data").rename(below / "weights")
    proto = onnx.load(model, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in (e for e in tensor.external_data if e.key == "location"):
            entry.value = "data/weights"
    model.write_bytes(proto.SerializeToString())
    assert (Session(model).run(x)["output"] == wanted).all()
    add_lora(model, tmp_path / "slots.onnx")
    assert (Session(tmp_path / "slots.onnx").run(x)["output"] == wanted).all()
    with (below / "weights").open("r+b") as file:
        file.write(b"else")
    with pytest.raises(ExportError, match="other values in"):
        Session(model)
    below.rename(tmp_path / "elsewhere")
    below.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ExportError, match="is a link or no plain file"):
        Session(model)


@pytest.mark.parametrize(
    "location",
    ["../model.onnx.data", "./../model.onnx.data", "./", "/etc/passwd", "a\\b", "c:d", "", "..",
     "a/../model.onnx.data", "a//b", "a/./b", "a/"],
)  # fmt: skip
def test_data_lies_beside_the_model(model: Path, location: str) -> None:
    rewrite(model, "location", location)
    with pytest.raises(ExportError, match="expected the name of a file"):
        Session(model)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("offset", "-1", "offset '-1'"),
        ("length", "many", "length 'many'"),
        ("length", "12", "12 bytes of external data, its shape .* takes"),
        ("offset", "99999999", "the data file is truncated"),
        ("color", "blue", "unknown or repeated: color"),
        ("location", "elsewhere.data", "elsewhere.data: No such file"),
    ],
)
def test_ranges_add_up(model: Path, key: str, value: str, reason: str) -> None:
    rewrite(model, key, value)
    with pytest.raises(ExportError, match=reason):
        Session(model)


def test_shifted_ranges_are_refused(model: Path) -> None:
    proto = onnx.load(model, load_external_data=False)
    tensors = [t for t in proto.graph.initializer if t.external_data]
    offsets = [int(next(e.value for e in t.external_data if e.key == "offset")) for t in tensors]
    first = offsets.index(min(offsets))
    rewrite(model, "offset", str(offsets[first] + 4), tensor=first)
    with pytest.raises(ExportError, match=r"overlap in model\.onnx\.data"):
        Session(model)


def _symlink(data: Path) -> None:
    data.rename(data.with_name("real"))
    data.symlink_to("real")


def _hard_link(data: Path) -> None:
    os.link(data, data.with_name("other"))


def _fifo(data: Path) -> None:
    data.unlink()
    os.mkfifo(data)


@pytest.mark.parametrize("spoil", [_symlink, _hard_link, _fifo])
def test_links_and_devices_are_refused(model: Path, spoil: Callable[[Path], None]) -> None:
    spoil(model.with_name("model.onnx.data"))
    with pytest.raises(ExportError, match="is a link or no plain file"):
        Session(model)
