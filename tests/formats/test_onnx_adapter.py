"""onnxruntime's adapter files through the same two functions as any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapters.adapter import Adapter, Update
from lora_fx.errors import AdapterError, ExportError
from lora_fx.formats import load_adapter, save_adapter
from lora_fx.testing import fits, same_adapter

X = torch.linspace(-1, 1, 84).reshape(4, 7, 3)


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)).eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    gm = lora_fx.trace(base(), (X,), dynamic_shapes=({0: "batch"},))
    lora_fx.to_onnx(gm, path, adapters="input")
    return path


def trained(**scales: float) -> Adapter:
    make = torch.Generator().manual_seed(1)
    sizes = {"0": (5, 3), "2": (4, 5)}
    updates = {}
    for name, scale in scales.items():
        out, into = sizes[name.removeprefix("layer")]
        down, up = (torch.randn(s, generator=make) for s in ((2, into), (out, 2)))
        updates[name.removeprefix("layer")] = Update(down, up, scale)
    return Adapter("a", updates)


def test_what_is_written_for_a_model_is_read_back(tmp_path: Path, model: Path) -> None:
    adapter = trained(layer0=1.7, layer2=0.3)
    file = tmp_path / "french.onnx_adapter"
    save_adapter(adapter, file, format="onnx_adapter", model=model)
    found = load_adapter(file)
    assert found.name == "french"
    assert {path: update.scale for path, update in found.updates.items()} == {"0": 1.0, "2": 1.0}
    for path, update in found.updates.items():
        assert torch.equal(update.down, adapter.updates[path].down)
    session = lora_fx.Session(model)
    (output,) = session.run({"input": X}, adapter=file).values()
    fits(found, base(), X, torch.from_numpy(output))


def test_load_save_load_keeps_every_bit(tmp_path: Path, model: Path) -> None:
    save_adapter(trained(layer2=1.7), tmp_path / "a.bin", format="onnx_adapter", model=model)
    first = load_adapter(tmp_path / "a.bin")
    assert list(first.updates) == ["2"]
    save_adapter(first, tmp_path / "b.bin", format="onnx_adapter", model=model)
    same_adapter(load_adapter(tmp_path / "b.bin", format="onnx_adapter"), first)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    save_adapter(first, tmp_path / "peft")
    same_adapter(load_adapter(tmp_path / "peft"), first)


def test_writing_needs_the_model(tmp_path: Path, model: Path) -> None:
    with pytest.raises(AdapterError, match="is made for one model; pass model="):
        save_adapter(trained(layer0=1.0), tmp_path / "a", format="onnx_adapter")
    (tmp_path / "a").write_bytes(b"mine")
    with pytest.raises(ExportError, match="a"):
        save_adapter(trained(layer0=1.0), tmp_path / "a", format="onnx_adapter", model=model)
    assert (tmp_path / "a").read_bytes() == b"mine"


@pytest.mark.parametrize("content", [b"\0\0\0\0TORT", b"\0\0\0\0TORT" + b"\xff" * 200])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.onnx_adapter").write_bytes(content)
    with pytest.raises(AdapterError, match=r"a\.onnx_adapter: damaged"):
        load_adapter(tmp_path / "a.onnx_adapter")
