"""Bases in a few bits on the command line: a QLoRA's directory exported, a file quantised."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import peft
import pytest
import torch

from lora_fx.cli import main
from lora_fx.export import Session
from lora_fx.graph.example import STORED
from lora_fx.testing import save_bitsandbytes, tiny

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
SIZES = {"num_hidden_layers": 1, "hidden_size": 40, "intermediate_size": 56}
TASK = ["--task", "text-generation"]


class Qlora:
    """A base in NF4 as transformers saves it, and PEFT's adapter of it, which eager runs.

    Attributes:
        base: a model of the numbers that were stored.
        tuned: the same with the adapter.
    """

    def __init__(self, root: Path) -> None:
        torch.manual_seed(0)
        self.root, self.base = root, tiny("LlamaForCausalLM", **SIZES).eval()
        self.base.config._name_or_path = ""
        self.plain = copy.deepcopy(self.base)
        numbers = save_bitsandbytes(self.base, root / "base")
        self.base.load_state_dict(numbers, strict=False)
        config = peft.LoraConfig(
            r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
        )
        self.tuned = peft.get_peft_model(copy.deepcopy(self.base), config)
        for name, parameter in self.tuned.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.3)
        self.tuned.eval().save_pretrained(root / "french")


@pytest.fixture(scope="module")
def qlora(tmp_path_factory: pytest.TempPathFactory) -> Qlora:
    return Qlora(tmp_path_factory.mktemp("qlora"))


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert end.value.code == code, said.err
    return said.out if code == 0 else said.err


def logits(model: Any) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        found: np.ndarray[Any, Any] = model(input_ids=IDS).logits.numpy()
        return found


def off(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def feeds() -> dict[str, torch.Tensor]:
    return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def kinds(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node if "MatMul" in node.op_type]


def test_a_qlora_is_exported_in_nf4_with_its_adapter_to_swap(
    qlora: Qlora, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, adapter = tmp_path / "out", qlora.root / "french"
    common = (qlora.root / "base", "--adapter", adapter, *TASK)
    text = run(capsys, "export", *common, "--mode", "swappable", "-o", out)
    assert "7 weights in nf4 in blocks of 64" in text
    assert "as it is: lm_head: a head" in text
    assert kinds(out / "model.onnx").count("MatMulBnb4") == 7
    session = Session(out / "model.onnx")
    found = session.run(feeds(), out / "french.onnx_adapter")["logits"]
    assert off(found, logits(qlora.tuned)) <= 1e-5
    assert off(session.run(feeds())["logits"], logits(qlora.base)) <= 1e-5
    assert off(session.run(feeds())["logits"], logits(qlora.plain)) > 1e-3  # the control
    assert off(found, logits(qlora.base)) > 0.05
    metadata = {entry.key: entry.value for entry in onnx.load(out / "model.onnx").metadata_props}
    assert metadata[STORED] == "nf4:64"
    report = json.loads((out / "report.json").read_text())
    assert set(report["quantised"]["weights"].values()) == {0.0}
    assert not any("held against the graph itself" in note for note in report["notes"])
    said = run(capsys, "verify", out / "model.onnx", "--against", *common)
    assert "nf4 in blocks of 64" in said


def test_merged_what_the_adapter_changed_is_plain(
    qlora: Qlora, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ("--adapter", qlora.root / "french", *TASK, "-o", out)
    text = run(capsys, "export", qlora.root / "base", *options)
    assert "5 weights in nf4" in text
    assert "q_proj: its numbers are not all of nf4" in text
    found = Session(out / "model.onnx").run(feeds())["logits"]
    assert off(found, logits(qlora.tuned)) <= 1e-5


def test_a_qlora_may_be_stored_in_another_way_then_quantised(
    qlora: Qlora, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, small = tmp_path / "out", tmp_path / "small.onnx"
    run(capsys, "export", qlora.root / "base", *TASK, "--bits", "float", "-o", out)
    assert set(kinds(out / "model.onnx")) == {"MatMul"}
    found = Session(out / "model.onnx").run(feeds())["logits"]
    assert off(found, logits(qlora.base)) <= 1e-5
    text = run(
        capsys, "quantize", out, "-o", small, "--bits", "8", "--keep", "*.o_proj", "--table", "*"
    )
    assert "6 weights in 8 bits in blocks of 32" in text
    assert "as it is: model.embed_tokens: onnxruntime looks up no rows of 40 in 8 bits" in text
    assert "as it is: model.layers.0.self_attn.o_proj: asked for" in text
    assert "weight model.layers.0.mlp.up_proj" in text
    report = json.loads(run(capsys, "quantize", out, "-o", small, "--json", "--force"))
    assert report["verified"]
    assert report["quantised"]["scheme"] == "4 bits in blocks of 32"
    assert 0 < report["quantised"]["outputs"]["logits"] < 0.5
    assert "exists" in run(capsys, "quantize", out, "-o", small, code=2)
    assert "expected 4 or 8 bits" in run(
        capsys, "quantize", out, "-o", tmp_path / "a.onnx", "--bits", "six", code=2
    )
    assert not (tmp_path / "a.onnx").exists()


def test_bits_that_are_none_are_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = run(capsys, "export", "no_such_model", "--bits", "3", "-o", tmp_path / "out", code=2)
    assert "expected 4 or 8 bits" in said
