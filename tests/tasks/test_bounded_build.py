"""Configs that ask for more than their directory holds are refused before anything is made."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_fx.errors import LoraFxError
from lora_fx.tasks.adapter_task import AdapterTask
from lora_fx.tasks.bounded_build import bounded, check_config
from lora_fx.tasks.directory import load_directory
from lora_fx.tasks.pipeline import load_pipeline
from lora_fx.testing import tiny
from lora_fx.testing.pipelines import tiny_unet


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "bert"
    tiny("BertForMaskedLM").save_pretrained(path)
    return path


def claimed(directory: Path, out: Path, **fields: Any) -> Path:
    """The same model, whose config says something else."""
    out.mkdir()
    for file in directory.iterdir():
        (out / file.name).symlink_to(file)
    config = json.loads((directory / "config.json").read_text()) | fields
    (out / "config.json").unlink()
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 10**12}, "describes a larger model than the .* as weight"),
        ({"intermediate_size": 10**12}, "describes a larger model"),
        ({"vocab_size": 10**12}, "describes a larger model"),
        ({"num_hidden_layers": 10**9}, r"config\.json: num_hidden_layers is 1000000000"),
        ({"num_hidden_layers": 10**5}, "describes a larger model"),
        ({"num_labels": 10**9}, "num_labels is 1000000000, expected at most"),
        ({"text_config": {"n_layer": 1e30}}, "n_layer is 1e[+]30"),
        ({"id2label": {str(n): "x" for n in range(40_000)}}, "id2label has 40000 fields"),
        ({"_attn_implementation": "some/kernel"}, "code of a hub"),
    ],
    ids=str,
)
def test_sizes_that_a_config_claims(
    directory: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    path = claimed(directory, tmp_path / "model", **fields)
    before = time.process_time()  # and not what other processes take
    with pytest.raises(LoraFxError, match=message):
        load_directory(path, AdapterTask())
    assert time.process_time() - before < 2


def test_what_it_holds_is_loaded(directory: Path, tmp_path: Path) -> None:
    path = claimed(directory, tmp_path / "model", rope_theta=10**10, max_length=10**20)
    assert load_directory(path, AdapterTask()).lacks == ()


def test_a_model_of_diffusers_is_bounded_too(tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path / "unet")
    fields = {"cross_attention_dim": 10**12}
    with pytest.raises(LoraFxError, match="describes a larger model"):
        load_pipeline(claimed(tmp_path / "unet", tmp_path / "large", **fields), None)


def test_modules_with_values_are_not_counted(tmp_path: Path) -> None:
    with bounded(tmp_path):
        for _ in range(600):
            nn.Linear(2, 3)
    with (
        bounded(tmp_path),
        torch.device("meta"),
        pytest.raises(LoraFxError, match="larger model"),
    ):
        nn.Sequential(*(nn.Linear(2, 3) for _ in range(600)))
    with torch.device("meta"):  # the hooks are gone
        nn.Linear(10**6, 10**6)


def test_a_config_of_any_depth(tmp_path: Path) -> None:
    nested: object = {"num_layers": 10**7}
    for _ in range(5_000):
        nested = [nested]
    with pytest.raises(LoraFxError, match="num_layers is 10000000"):
        check_config(tmp_path, nested)
