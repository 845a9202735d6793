"""Directories in Python: the parts that the command line exports, traced and written by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

import lora_fx
from lora_fx import LoraFxError
from lora_fx.tasks import load
from lora_fx.testing import relative

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a head, and PEFT's adapter of a classifier of three classes."""
    path = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES)).save_pretrained(path / "base")
    return path


def test_a_part_is_traced_exported_and_its_companions_written(home: Path, tmp_path: Path) -> None:
    (part,) = load(home / "base")
    report = lora_fx.to_onnx(part.traced(), tmp_path / part.file)
    assert (report.task, report.verified) == ("feature-extraction", True)
    assert part.write_beside is not None
    part.write_beside(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == (home / "base/config.json").read_bytes()


def test_adapters_decide_the_class_and_its_labels(home: Path, tmp_path: Path) -> None:
    model = BertForSequenceClassification.from_pretrained(home / "base", num_labels=3).eval()
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False)
    tuned = peft.get_peft_model(copy.deepcopy(model), config).eval()
    tuned.save_pretrained(tmp_path / "news")
    (part,) = load(home / "base", adapters=[tmp_path / "news"])
    gm = lora_fx.inject(part.traced(), lora_fx.load_adapter(tmp_path / "news"))
    found = gm(**part.kwargs)
    with torch.no_grad():
        wanted, base = tuned(**part.kwargs).logits, model(**part.kwargs).logits
    logits = found["logits"] if isinstance(found, dict) else found.logits
    assert relative(logits, wanted) <= 1e-5
    assert relative(base, wanted) > 1e-2


def test_what_a_directory_cannot_be_loaded_for_is_refused(home: Path) -> None:
    with pytest.raises(LoraFxError, match=r"nowhere: no such directory"):
        load(home / "nowhere")
    with pytest.raises(LoraFxError, match=r"'poetry': expected one of .*fill-mask"):
        load(home / "base", "poetry")
    with pytest.raises(LoraFxError, match=r"no weights.* classifier"):
        load(home / "base", "text-classification")
