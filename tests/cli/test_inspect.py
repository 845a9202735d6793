"""Adapters and exported models as plain values, and as lines of text."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import Adapter
from lora_fx.cli.adapter_options import AdapterOptions
from lora_fx.cli.commands import REPORT
from lora_fx.cli.inspect import as_text, describe
from lora_fx.cli.pages import compared
from lora_fx.errors import LoraFxError
from lora_fx.testing import make_adapter, tiny
from tests.io.gguf_bytes import gguf

MakeAdapter = Callable[..., Adapter]


@pytest.fixture
def french() -> Adapter:
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


@pytest.mark.parametrize(
    ("file", "format", "given"),
    [
        ("french.safetensors", "peft_file", AdapterOptions()),
        ("french.safetensors", "loralib", AdapterOptions()),
        ("french.pt", "loralib", AdapterOptions(alpha=["3"], allow_pickle=True)),
        ("french.safetensors", "diffusers", AdapterOptions(component="unet")),
        (
            "french.safetensors",
            "kohya",
            AdapterOptions(component="unet", base="model_to_describe:make"),
        ),
    ],
)
def test_a_single_file_shows_what_a_directory_shows(
    tmp_path: Path,
    french: Adapter,
    file: str,
    format: str,
    given: AdapterOptions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = "from torch import nn\n\n\ndef make():\n    return nn.Sequential(nn.Linear(3, 5))\n"
    (tmp_path / "model_to_describe.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "model_to_describe", raising=False)
    hints = {} if given.component is None else {"component": given.component}
    lora_fx.save_adapter(french, tmp_path / file, format=format, **hints)
    lora_fx.save_adapter(french, tmp_path / "french")
    report, expected = describe(tmp_path / file, given), describe(tmp_path / "french")
    assert list(report.pop("digests")) == [file]
    assert [report["kind"], report["name"]] == ["adapter", "french"]
    assert report["targets"] == expected["targets"]


@pytest.mark.parametrize(
    ("config", "target"),
    [
        (
            peft.LoraConfig(r=2, target_modules=["fc"], use_dora=True, init_lora_weights=False),
            {"kind": "dora", "shape": [5, 3], "rank": 2, "scale": 4.0},
        ),
        (
            peft.IA3Config(target_modules=["fc"], feedforward_modules=[], init_ia3_weights=False),
            {"kind": "ia3", "shape": [5, None]},
        ),
        (
            peft.LoKrConfig(r=2, alpha=3, target_modules=["fc"], init_weights=False),
            {"kind": "lokr", "shape": [5, 3]},
        ),
    ],
)
def test_every_kind_is_shown(tmp_path: Path, config: Any, target: dict[str, Any]) -> None:
    model = peft.get_peft_model(nn.ModuleDict({"fc": nn.Linear(3, 5)}), config)
    model.save_pretrained(tmp_path / "other")
    report = describe(tmp_path / "other")
    (found,) = report["targets"]
    assert {name: found[name] for name in target} == target
    assert any(name.endswith(("_norm", "norms")) for name in found)
    assert f"fc  kind {target['kind']}  shape 5, " in as_text(report)


def test_hints_that_are_missing_are_asked_for(tmp_path: Path, french: Adapter) -> None:
    lora_fx.save_adapter(french, tmp_path / "french.pt", format="loralib")
    with pytest.raises(LoraFxError, match="pickle"):
        describe(tmp_path / "french.pt")
    with pytest.raises(LoraFxError, match="pass alpha="):
        describe(tmp_path / "french.pt", AdapterOptions(allow_pickle=True))


def test_a_gguf_is_shown_by_the_layers_of_its_base(tmp_path: Path) -> None:
    base = tiny("LlamaForCausalLM")
    base.save_pretrained(tmp_path / "base")
    size = base.config.hidden_size
    said = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    pair = {"lora_a": torch.ones(2, size), "lora_b": torch.ones(size, 2)}
    tensors = {f"blk.0.attn_q.weight.{end}": tensor for end, tensor in pair.items()}
    (tmp_path / "french.gguf").write_bytes(gguf(said | {"adapter.lora.alpha": 6.0}, tensors))
    with pytest.raises(LoraFxError, match=r"french\.gguf: has llama\.cpp's names, .*pass base="):
        describe(tmp_path / "french.gguf")
    report = describe(tmp_path / "french.gguf", AdapterOptions(base=str(tmp_path / "base")))
    (target,) = report["targets"]
    assert target["path"] == "model.layers.0.self_attn.q_proj"
    assert (target["rank"], target["scale"]) == (2, 3)


def test_a_swappable_model_and_its_adapter_share_a_version(tmp_path: Path, french: Adapter) -> None:
    from lora_fx.export import export_adapter

    model, file = tmp_path / "model.onnx", tmp_path / "french.onnx_adapter"
    gm = lora_fx.trace(nn.Sequential(nn.Linear(3, 5)).eval(), (torch.randn(4, 7, 3),))
    lora_fx.to_onnx(gm, model, adapters="input", slots=["0"])
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
    with pytest.raises(LoraFxError, match=r"notes\.txt: expected an adapter \(a directory, a"):
        describe(tmp_path / "notes.txt")


def test_the_directory_of_an_export_is_its_model(tmp_path: Path) -> None:
    gm = lora_fx.trace(nn.Sequential(nn.Linear(3, 5)).eval(), (torch.randn(2, 3),))
    out = tmp_path / "out"
    out.mkdir()
    lora_fx.to_onnx(gm, out / "model.onnx")
    assert describe(out) == describe(out / "model.onnx")
    assert str(compared(out, out, AdapterOptions())).count("model.onnx")
    with pytest.raises(
        LoraFxError, match=r"adapter_config\.json: no such file.*: give an adapter's"
    ):
        describe(tmp_path)
    (tmp_path / REPORT).write_text("{}")  # a pipeline's models are one level below
    assert describe(tmp_path) == describe(out / "model.onnx")
    lora_fx.to_onnx(gm, out / "other.onnx")
    for place in (out, tmp_path):
        with pytest.raises(
            LoraFxError, match=r"expected a file: give one of its own, .*model\.onnx, "
        ):
            describe(place)


def test_text_has_one_line_a_value() -> None:
    report = {
        "kind": "adapter",
        "norm": 0.123456,
        "inputs": ["x", "y"],
        "none": [],
        "shape": [5, None],
        "norms": [0.5, 0.123456],
        "targets": [{"path": "0", "rank": 2, "shape": [5, 3]}, {"path": "1", "rank": 4}],
        "digests": {"file": "sha256:0"},
    }
    assert as_text(report).splitlines() == [
        "kind adapter",
        "norm 0.1235",
        "inputs x, y",
        "none ",
        "shape 5, ?",
        "norms 0.5, 0.1235",
        "targets 2",
        "  0  rank 2  shape 5, 3",
        "  1  rank 4",
        "digests",
        "  file  sha256:0",
    ]
