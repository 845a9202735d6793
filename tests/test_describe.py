"""Adapters and exported models as plain values, and as lines of text."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import Adapter
from lora_fx.describe import as_text, describe
from lora_fx.errors import LoraFxError

MakeAdapter = Callable[..., Adapter]


@pytest.fixture
def french(make_adapter: MakeAdapter) -> Adapter:
    return make_adapter({"0": (5, 3)}, rank=2, scale=1.5)


def test_an_adapter_shows_each_target(tmp_path: Path, french: Adapter) -> None:
    lora_fx.save_adapter(french, tmp_path / "french")
    report = describe(tmp_path / "french")
    (target,) = report["targets"]
    norm = (1.5 * french.updates["0"].up @ french.updates["0"].down).norm().item()
    assert target.pop("norm") == pytest.approx(norm, rel=1e-5)
    assert target == {"path": "0", "kind": "lora", "shape": [5, 3], "rank": 2, "scale": 1.5}
    assert (report["kind"], report["name"], report["replaced"]) == ("adapter", "french", [])
    weights = (tmp_path / "french" / "adapter_model.safetensors").read_bytes()
    digest = f"sha256:{hashlib.sha256(weights).hexdigest()}"
    assert report["digests"]["adapter_model.safetensors"] == digest
    assert json.loads(json.dumps(report)) == report


def test_a_swappable_model_and_its_adapter_share_a_version(tmp_path: Path, french: Adapter) -> None:
    from lora_fx.export import export_adapter, to_onnx

    model, file = tmp_path / "model.onnx", tmp_path / "french.onnx_adapter"
    gm = lora_fx.trace(nn.Sequential(nn.Linear(3, 5)).eval(), (torch.randn(4, 7, 3),))
    to_onnx(gm, model, adapters="input", slots=["0"])
    export_adapter(french, model, file)
    report = describe(model)
    assert report["kind"] == "model"
    assert report["inputs"] == ["input"]
    assert [slot["path"] for slot in report["slots"]] == ["0"]
    assert list(report["digests"]) == ["model.onnx"]
    stored = describe(file)
    assert stored["kind"] == "adapter file"
    assert stored["model_version"] == report["model_version"]
    shapes = {value["name"]: value["shape"] for value in stored["values"]}
    assert shapes == {"0.lora_A": [3, 2], "0.lora_B": [2, 5]}
    up = next(value["norm"] for value in stored["values"] if value["name"] == "0.lora_B")
    assert up == pytest.approx((1.5 * french.updates["0"].up).norm().item(), rel=1e-5)


def test_anything_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoraFxError, match="nowhere: no such file or directory"):
        describe(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(LoraFxError, match=r"notes\.txt: expected an adapter directory, a \.onnx"):
        describe(tmp_path / "notes.txt")


def test_text_has_one_line_a_value() -> None:
    report = {
        "kind": "adapter",
        "norm": 0.123456,
        "inputs": ["x", "y"],
        "none": [],
        "targets": [{"path": "0", "rank": 2, "shape": [5, 3]}, {"path": "1", "rank": 4}],
        "digests": {"file": "sha256:0"},
    }
    assert as_text(report).splitlines() == [
        "kind adapter",
        "norm 0.1235",
        "inputs x, y",
        "none ",
        "targets 2",
        "  0  rank 2  shape 5, 3",
        "  1  rank 4",
        "digests",
        "  file  sha256:0",
    ]
