"""Directories of models by strangers: nothing outside them is read, and no raw error comes out."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lora_fx.errors import LoraFxError
from lora_fx.tasks.adapter_task import AdapterTask
from lora_fx.tasks.directory import load_directory, prepared_by
from lora_fx.tasks.directory_files import check_files, variant_of
from lora_fx.tasks.pipeline import load_pipeline
from lora_fx.testing import tiny
from lora_fx.testing.pipelines import tiny_vae

INDEX = "model.safetensors.index.json"
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "shards"
    tiny("BertForMaskedLM").save_pretrained(path, max_shard_size="20KB")
    load_directory(path, AdapterTask())  # imports are not timed
    return path


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """Beside it another model, whose weights are none of its own."""
    shutil.copytree(original, tmp_path / "other")
    shutil.copytree(original, tmp_path / "model")
    return tmp_path / "model"


def edited(name: str, change: Callable[[Any], Any]) -> Change:
    def apply(path: Path) -> None:
        file = path / name
        file.write_text(json.dumps(change(json.loads(file.read_text()))))

    return apply


def mapped(change: Callable[[str], object]) -> Change:
    """Changes the names of all files in an index."""
    return edited(
        INDEX,
        lambda index: {
            **index,
            "weight_map": {k: change(v) for k, v in index["weight_map"].items()},
        },
    )


def indexed(value: Any) -> Change:
    return edited(INDEX, lambda _: value)


def configured(**fields: Any) -> Change:
    return edited("config.json", lambda config: config | fields)


def text(name: str, content: str) -> Change:
    return lambda path: (path / name).write_text(content)


def absolute(path: Path) -> None:
    mapped(lambda name: str(path.parent / "other" / name))(path)


def cut(path: Path) -> None:
    file = min(path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-40])


def empty(path: Path) -> None:
    min(path.glob("*.safetensors")).write_bytes(b"")


def lost(path: Path) -> None:
    min(path.glob("*.safetensors")).unlink()


def pipe(name: str) -> Change:
    def apply(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        os.mkfifo(path / name)

    return apply


def holes(path: Path) -> None:
    os.truncate(min(path.glob("*.safetensors")), 200 << 30)


BESIDE = "expected names of files beside it"
NO_MAP = "weight_map is .*, expected names of tensors to names of files"
CASES: dict[str, tuple[Change, str]] = {
    "up": (mapped(lambda name: f"../other/{name}"), BESIDE),
    "absolute": (absolute, BESIDE),
    "down and up": (mapped(lambda name: f"a/../../other/{name}"), BESIDE),
    "below": (mapped(lambda name: f"below/{name}"), BESIDE),
    "backslash": (mapped(lambda name: f"..\\other\\{name}"), BESIDE),
    "home": (mapped(lambda name: f"~/{name}"), BESIDE),
    "drive": (mapped(lambda name: f"C:{name}"), BESIDE),
    "NUL": (mapped(lambda name: f"{name}\0"), BESIDE),
    "the directory": (mapped(lambda name: "."), BESIDE),
    "no name": (mapped(lambda name: ""), BESIDE),
    "a long name": (mapped(lambda name: name * 500), BESIDE),
    "not there": (mapped(lambda name: f"no_{name}"), "which are not there"),
    "a list": (indexed([1, 2]), NO_MAP),
    "a word": (indexed("weights"), NO_MAP),
    "nothing": (indexed(None), NO_MAP),
    "no map": (indexed({}), NO_MAP),
    "a map that is a list": (indexed({"weight_map": ["a"]}), NO_MAP),
    "a map to numbers": (mapped(lambda name: 3), NO_MAP),
    "a map to lists": (mapped(lambda name: [name]), NO_MAP),
    "no JSON": (text(INDEX, "{"), "cannot be read"),
    "deep": (text(INDEX, "[" * 100_000), "cannot be read"),
    "of another kind": (
        text("pytorch_model.bin.index.json", '{"weight_map": {"a": "../../b.bin"}}'),
        BESIDE,
    ),
    "cut": (cut, "transformers cannot load it"),
    "empty": (empty, "transformers cannot load it"),
    "lost": (lost, "which are not there, expected every file"),
    "a file of holes": (holes, "nearly all are holes, expected stored ones"),
    "a FIFO as index": (pipe(INDEX), "a FIFO, expected a plain file"),
    "a FIFO as weights": (pipe("pytorch_model.bin"), "a FIFO, expected a plain file"),
    "a FIFO as tokenizer": (pipe("tokenizer_config.json"), "a FIFO, expected a plain file"),
    "sizes that are words": (configured(hidden_size="many"), "transformers cannot"),
    "sizes that are lists": (configured(hidden_size=[24]), "transformers cannot"),
    "layers that are words": (configured(num_hidden_layers="two"), "transformers cannot"),
    "negative sizes": (configured(hidden_size=-3), "transformers cannot"),
    "labels that are words": (configured(num_labels="x"), "transformers cannot"),
    "the base of all models": (configured(architectures=["PreTrainedModel"]), "which is no model"),
    "a mixin": (configured(architectures=["GenerationMixin"]), "which is no model"),
    "a config": (configured(architectures=["BertConfig"]), "which is no model"),
    "a module": (configured(architectures=["models"]), "which is no model"),
    "a model of another config": (configured(architectures=["GPT2LMHeadModel"]), "cannot load it"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_directory_is_refused_soon(case: str, model: Path) -> None:
    change, message = CASES[case]
    change(model)
    begin = time.perf_counter()
    with pytest.raises(LoraFxError, match=f"model.*{message}"):
        load_directory(model, AdapterTask())
    assert time.perf_counter() - begin < 2


@pytest.mark.parametrize("task", ["TOKEN_CLS", "SEQ_CLS"])
def test_a_config_that_is_none_of_a_head_is_refused(task: str, model: Path) -> None:
    configured(hidden_size=-3, architectures=["BertModel"])(model)
    with pytest.raises(LoraFxError, match=r"model: .*config\.json does not describe a BertFor"):
        load_directory(model, AdapterTask(task, {"classifier.weight": (4, 24)}))


@pytest.mark.parametrize("content", ["[1", "[" * 100_000, '{"a": ' * 100_000])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "preprocessor_config.json"])
def test_what_prepares_inputs_is_refused_by_name(name: str, content: str, model: Path) -> None:
    loaded = load_directory(model, AdapterTask())
    text(name, content)(model)
    with pytest.raises(LoraFxError, match=f"{name}: cannot be read"):
        prepared_by(model, loaded.model.config)


class Absent(type):
    """What transformers has in the place of a class whose package is not there."""

    def __getattribute__(cls, name: str) -> object:
        raise ImportError(f"{name} needs another package")


def test_a_tokenizer_of_a_package_that_is_not_there_says_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.PLBartConfig()
    kinds = (Absent("Tokenizer", (), {}), transformers.BertTokenizer)
    monkeypatch.setattr("transformers.TOKENIZER_MAPPING", {type(config): kinds})
    found = prepared_by(model, config).names
    assert found == transformers.BertTokenizer.model_input_names


def test_images_are_of_the_size_that_transformers_has_where_a_directory_is_silent(
    model: Path,
) -> None:
    found = prepared_by(model, transformers.SegformerConfig())
    assert found.processor["size"] == {"height": 512, "width": 512}
    text("preprocessor_config.json", '{"size": {"height": 64, "width": 32}}')(model)
    found = prepared_by(model, transformers.SegformerConfig())
    assert found.processor["size"] == {"height": 64, "width": 32}


def test_shards_are_loaded_also_through_links_of_a_cache(model: Path) -> None:
    blobs = model.with_name("blobs")
    blobs.mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.move(file, blobs / str(number))
        file.symlink_to(Path("..", "blobs", str(number)))
    check_files(model)
    loaded = load_directory(model, AdapterTask())
    wanted = load_directory(model.with_name("other"), AdapterTask()).model.state_dict()
    assert loaded.lacks == ()
    assert all(torch.equal(v, wanted[k]) for k, v in loaded.model.state_dict().items())


@pytest.mark.parametrize("size", ["20KB", "1GB"])
def test_weights_that_lie_there_in_one_other_precision_are_those(size: str, tmp_path: Path) -> None:
    net = tiny("BertForMaskedLM").half()
    net.save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    assert variant_of(tmp_path) == "fp16"
    loaded = load_directory(tmp_path, AdapterTask())
    assert loaded.lacks == ()
    wanted = net.state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in loaded.model.state_dict().items())
    if size == "20KB":
        index = "model.safetensors.index.fp16.json"
        edited(index, lambda i: {**i, "weight_map": dict.fromkeys(i["weight_map"], "../a")})(
            tmp_path
        )
        with pytest.raises(LoraFxError, match=BESIDE):
            load_directory(tmp_path, AdapterTask())
        return
    one = tmp_path / "model.fp16.safetensors"
    shutil.copy(one, tmp_path / "model.bf16.safetensors")
    with pytest.raises(LoraFxError, match="holds the weights as bf16, fp16: take all but one"):
        load_directory(tmp_path, AdapterTask())
    shutil.copy(one, tmp_path / "model.safetensors")
    assert variant_of(tmp_path) is None


def test_a_model_of_diffusers_in_one_other_precision_is_loaded(tmp_path: Path) -> None:
    vae = tiny_vae().half()
    vae.save_pretrained(tmp_path, variant="fp16")
    found = load_pipeline(tmp_path).models["vae"]
    assert found.lacks == ()
    assert all(
        torch.equal(v.half(), vae.state_dict()[k]) for k, v in found.model.state_dict().items()
    )
