"""What pages name and do not make: a decoder, adapters that PEFT wrote for it, a pipeline."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_fx.cli.commands import export_model

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "the", "cat", "dog", "eats", "sleeps", "and"]
EVERY_WORD = WORDS + [f"word{number}" for number in range(97 - len(WORDS))]


@dataclass
class World:
    """Makes each of these once, when a page first names it.

    Attributes:
        root: where they are.
    """

    root: Path
    _made: set[str] = field(default_factory=set)

    def path(self, name: str) -> Path:
        if name not in self._made:
            self._made.add(name)
            MAKERS[name](self)
        return self.root / name


def _model() -> Any:
    from lora_fx.testing import tiny

    torch.manual_seed(0)
    return tiny("LlamaForCausalLM", use_cache=True, head_dim=8)


def _llama(world: World) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {word: number for number, word in enumerate(EVERY_WORD)}
    words = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    _model().save_pretrained(world.root / "llama")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **ends)
    tokenizer.save_pretrained(world.root / "llama")


def _adapter(world: World, name: str, **options: Any) -> None:
    import peft

    torch.manual_seed(len(name))
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", lora_alpha=8, init_lora_weights=False,
        target_modules=["q_proj", "v_proj", "down_proj"], **options,
    )  # fmt: skip
    peft.get_peft_model(copy.deepcopy(_model()), config).save_pretrained(str(world.root / name))


def _lokr(world: World) -> None:
    import peft

    torch.manual_seed(3)
    config = peft.LoKrConfig(
        task_type="CAUSAL_LM", r=2, alpha=4, target_modules=["q_proj"], init_weights=False
    )
    peft.get_peft_model(copy.deepcopy(_model()), config).save_pretrained(str(world.root / "lokr"))


def _out(world: World) -> None:
    llama, french = world.path("llama"), world.path("french")
    export_model(str(llama), [french], "swappable", world.root / "OUT", False, lambda stage: None)


def _pipeline(world: World) -> None:
    from lora_fx.testing.pipelines import save_diffusers_adapter, tiny_pipeline, tiny_unet

    tiny_pipeline(world.root / "pipeline")
    save_diffusers_adapter(world.root / "style", unet=tiny_unet())
    world._made.add("style")


MAKERS: dict[str, Callable[[World], None]] = {
    "llama": _llama,
    "french": partial(_adapter, name="french", r=4),
    "german": partial(_adapter, name="german", r=2),
    "dora": partial(_adapter, name="dora", r=2, use_dora=True),
    "lokr": _lokr,
    "OUT": _out,
    "pipeline": _pipeline,
    "style": _pipeline,
}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def here(page: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of a page's own to read it in, with what it names and does not make."""
    text = page.read_text()
    for name in MAKERS:
        if f"-o {name}/" in text or not any(f"{name}{end}" in text for end in ("/", '"', " -")):
            continue
        shutil.copytree(world.path(name), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path
