"""PEFT's default adapter of a classifier, with a head of its own, in one file for all of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from lora_fx import Session
from lora_fx.cli.commands import export_model
from lora_fx.testing import relative

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_labels": 3, "pad_token_id": 0,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    # Biases and norms' biases besides; a head that is called score, without a bias.
    "Bert": {"bias": "all"},
    "Llama": {"use_dora": True},
}


@pytest.mark.parametrize("family", OPTIONS)
def test_classifiers_swap_with_their_heads(family: str, tmp_path: Path) -> None:
    kind: Any = getattr(transformers, f"{family}ForSequenceClassification")
    torch.manual_seed(0)
    base = kind(kind.config_class(**SIZES)).eval()
    base.save_pretrained(tmp_path / "base")
    tuned = {}
    for name in ("news", "mails"):
        config = peft.LoraConfig(task_type="SEQ_CLS", r=2, **OPTIONS[family])
        tuned[name] = peft.get_peft_model(copy.deepcopy(base), config).eval()
        with torch.no_grad():
            for parameter in tuned[name].parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        tuned[name].save_pretrained(tmp_path / name)
    paths = [tmp_path / name for name in tuned]
    out = tmp_path / "out"
    report: Any = export_model(
        str(tmp_path / "base"), paths, "swappable", out, False, lambda stage: None
    )
    assert report.verified
    assert {row.what for row in report.checks} == {"base", "adapted", *tuned}
    assert [(one.adapter, one.used == one.tensors) for one in report.coverage] == [
        (name, True) for name in tuned
    ]
    ids = torch.randint(1, 64, (2, 9))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    session = Session(out / "model.onnx", threads=1)
    given |= {name: torch.zeros_like(ids) for name in set(session.inputs) - given.keys()}
    with torch.no_grad():
        alone = base(**given).logits
        assert relative(torch.from_numpy(session.run(given)["logits"]), alone) <= 1e-5
        for name, owner in tuned.items():
            found = session.run(given, out / f"{name}.onnx_adapter")["logits"]
            wanted = owner(**given).logits
            assert relative(torch.from_numpy(found), wanted) <= 1e-5
            assert relative(alone, wanted) > 1e-2
