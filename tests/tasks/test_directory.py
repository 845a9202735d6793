"""Hugging Face directories: the class that adapters ask for, and no weight that is made up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from lora_fx.cli.commands import export_model, verify_model
from lora_fx.errors import AdapterWarning, LoraFxError
from lora_fx.tasks.adapter_task import AdapterTask
from lora_fx.tasks.directory import load_directory, refuse_lacking
from lora_fx.testing import relative, tiny

NO_TASK = AdapterTask()


def edited(path: Path, **fields: Any) -> Path:
    """Changes a directory's config; None takes a field out."""
    file = path / "config.json"
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({key: v for key, v in config.items() if v is not None}))
    return path


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tiny("BertForMaskedLM").save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_a_whole_directory_lacks_nothing(bert: Path) -> None:
    loaded = load_directory(bert, NO_TASK)
    assert type(loaded.model).__name__ == "BertForMaskedLM"
    assert loaded.lacks == ()  # the head's weight is tied, and so not in the file


def test_weights_that_are_not_there_are_named_unless_an_adapter_has_them(bert: Path) -> None:
    edited(bert, architectures=["BertForTokenClassification"])
    with pytest.warns(AdapterWarning, match="a BertForTokenClassification has no place for cls"):
        loaded = load_directory(bert, NO_TASK)
    assert loaded.lacks == ("classifier.bias", "classifier.weight")
    refuse_lacking(loaded.lacks, {"classifier.bias", "classifier.weight", "other"})
    with pytest.raises(LoraFxError, match=r"^holds no weights.* for classifier\.weight: they"):
        refuse_lacking(loaded.lacks, {"classifier.bias"})


def test_weights_of_another_shape_are_named(bert: Path) -> None:
    assert load_directory(edited(bert, vocab_size=98), NO_TASK).lacks


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "names no architectures"),
        ([], "names no architectures"),
        (7, "names no architectures"),
        ([["BertModel"]], "names no architectures"),
        (
            ["BertForNothing"],
            "the architecture 'BertForNothing', which is no model of transformers",
        ),
        (["BertTokenizer"], "'BertTokenizer', which is no model"),
        (["logging"], "'logging', which is no model"),
        (["__name__"], "'__name__', which is no model"),
    ],
)
def test_an_architecture_that_is_no_model_is_refused(bert: Path, found: Any, message: str) -> None:
    with pytest.raises(LoraFxError, match=message):
        load_directory(edited(bert, architectures=found), NO_TASK)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "no_such"}', '{"a": 1}'])
def test_a_config_that_cannot_be_read_is_refused(bert: Path, text: str) -> None:
    (bert / "config.json").write_text(text)
    with pytest.raises(LoraFxError, match=r"bert: transformers cannot|config.json: cannot be read"):
        load_directory(bert, NO_TASK)


TASKS = {
    "SEQ_CLS": "BertForSequenceClassification",
    "TOKEN_CLS": "BertForTokenClassification",
    "QUESTION_ANS": "BertForQuestionAnswering",
    "FEATURE_EXTRACTION": "BertModel",
    "CAUSAL_LM": "BertLMHeadModel",
}


@pytest.mark.filterwarnings("ignore::lora_fx.errors.AdapterWarning")
@pytest.mark.parametrize("task", TASKS)
def test_the_task_of_an_adapter_decides_the_class(bert: Path, task: str) -> None:
    loaded = load_directory(bert, AdapterTask(task, {"classifier.weight": (4, 24)}))
    assert type(loaded.model).__name__ == TASKS[task]
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        assert loaded.model.config.num_labels == 4
    again = edited(bert, architectures=[TASKS[task]])
    assert type(load_directory(again, AdapterTask(task)).model).__name__ == TASKS[task]


def test_a_class_that_generates_is_for_every_task_of_generation(tmp_path: Path) -> None:
    tiny("T5ForConditionalGeneration").save_pretrained(tmp_path)
    loaded = load_directory(tmp_path, AdapterTask("CAUSAL_LM"))
    assert type(loaded.model).__name__ == "T5ForConditionalGeneration"
    tiny("ViTModel").save_pretrained(tmp_path / "vit")
    with pytest.raises(LoraFxError, match=r"needs transformers' .* no class for a vit"):
        load_directory(tmp_path / "vit", AdapterTask("TOKEN_CLS"))


@pytest.mark.usefixtures("traced_once")
@pytest.mark.filterwarnings("ignore::lora_fx.errors.AdapterWarning")
def test_a_classifier_on_a_language_model_is_what_peft_computes(tmp_path: Path) -> None:
    """The head is the adapter's own; without it, or with the head of another task, refused."""
    from transformers import AutoModelForTokenClassification

    from lora_fx import Session

    torch.manual_seed(0)
    tiny("BertForMaskedLM").save_pretrained(tmp_path / "base")
    base = AutoModelForTokenClassification.from_pretrained(tmp_path / "base", num_labels=5)
    config = peft.LoraConfig(
        r=2, target_modules=["query"], task_type="TOKEN_CLS", init_lora_weights=False
    )
    tuned = peft.get_peft_model(base, config).eval()
    tuned.save_pretrained(tmp_path / "tagger")
    spec, out = str(tmp_path / "base"), tmp_path / "out"
    report = export_model(spec, [tmp_path / "tagger"], "merged", out, False, lambda _: None)
    assert report.verified
    ids = torch.randint(3, 97, (3, 7))
    feed = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    feed["token_type_ids"] = (torch.arange(7) > 3).long().expand(3, 7).contiguous()
    found = torch.tensor(Session(out / "model.onnx").run(feed)["logits"])
    with torch.no_grad():
        assert relative(found, tuned(**feed).logits) <= 1e-5
        assert relative(found, tuned(feed["input_ids"]).logits) > 1e-2
    assert verify_model(out / "model.onnx", spec, [tmp_path / "tagger"], lambda _: None).verified
    shutil.copytree(tmp_path / "tagger", tmp_path / "sorter")
    told = (tmp_path / "tagger" / "adapter_config.json").read_text()
    told = told.replace("TOKEN_CLS", "SEQ_CLS")
    (tmp_path / "sorter" / "adapter_config.json").write_text(told)
    nowhere = tmp_path / "nowhere"
    both = [tmp_path / "tagger", tmp_path / "sorter"]
    with pytest.raises(LoraFxError, match=r"tagger for TOKEN_CLS.*sorter for SEQ_CLS"):
        export_model(spec, both, "merged", nowhere, False, lambda _: None)
    edited(tmp_path / "base", architectures=["BertForTokenClassification"], num_labels=5)
    with pytest.raises(LoraFxError, match=r"for classifier\.bias, classifier\.weight"):
        export_model(spec, [], "merged", nowhere, False, lambda _: None)
    assert not nowhere.exists()
