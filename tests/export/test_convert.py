from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from lora_fx.errors import ExportError
from lora_fx.export import to_onnx
from lora_fx.export.convert import convert
from lora_fx.program import export_program
from lora_fx.trace import trace


def test_an_operator_without_onnx_form_is_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvals(x).real

    x = torch.randn(5, 5)
    gm = trace(Odd(), (x,))
    with pytest.raises(ExportError, match=r"no ONNX form: .*linalg_eig"):
        convert(export_program(gm, (x,), {}, None), None)


def test_the_exporter_is_quiet(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    gm = trace(nn.Linear(3, 5), (torch.randn(4, 3),))
    convert(export_program(gm, (torch.randn(4, 3),), {}, None), None)
    assert [r for r in caplog.records if r.name.startswith("torch.onnx")] == []
    assert capfd.readouterr() == ("", "")


def test_t5_whose_attention_reshapes_a_transposed_tensor(tmp_path: Path) -> None:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=100, use_cache=False
    )
    ids = torch.randint(0, 100, (2, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["decoder_input_ids"] = ids[:, :5].clone()
    shapes = {name: {0: "batch", 1: "length"} for name in inputs}
    shapes["decoder_input_ids"] = {0: "batch", 1: "written"}
    model = transformers.T5ForConditionalGeneration(config).eval()
    report = to_onnx(trace(model, (), inputs, dynamic_shapes=shapes), tmp_path / "model.onnx")
    assert report.verified
    assert report.outputs == ["logits", "encoder_last_hidden_state"]
