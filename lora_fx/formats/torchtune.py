"""Adapters of torchtune: its own names and order of rows, beside an ``adapter_config.json``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_fx.adapters.adapter import Adapter, AnyUpdate, Update
from lora_fx.errors import AdapterError, shorten, within
from lora_fx.formats.dialects import Dialect, check_adapted, sort_keys
from lora_fx.formats.hints import Hints
from lora_fx.formats.peft import CONFIG, read_config, weights_in
from lora_fx.formats.peft.lora import LoraConfig
from lora_fx.io.state_dict import read_file
from lora_fx.kinds import lora
from lora_fx.kinds.lora import DOWN, MAGNITUDE, UP
from lora_fx.layers.base_layers import BaseLayers

DIALECT = Dialect(
    {
        ".lora_a.weight": DOWN, ".lora_b.weight": UP,
        ".magnitude": MAGNITUDE, ".magnitude.weight": MAGNITUDE,
    },
    "<module>.lora_a.weight, .lora_b.weight and .magnitude",
)  # fmt: skip
_FORM = lora.Form(down=("r", "in"))
# What transformers calls the modules of torchtune's decoder.
_NAMES = {
    "attn": "self_attn", "output_proj": "o_proj", "w1": "gate_proj", "w2": "down_proj",
    "w3": "up_proj", "output": "lm_head", "tok_embeddings": "embed_tokens",
}  # fmt: skip
# How many heads a projection is of. torchtune turns neighbouring rows of a head together, as Meta
# does, transformers the rows of its two halves.
_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
# Of which models torchtune keeps the order of rows, and of which it does not.
_TURNED, _KEPT = {"llama", "mistral", "gemma", "gemma2"}, {"qwen2"}


def is_torchtune(directory: Path) -> bool:
    """Whether a directory has torchtune's own files beside a config."""
    return (directory / CONFIG).is_file() and _last(directory) is not None


def read_torchtune(path: Path, name: str, hints: Hints) -> Adapter:
    """Reads what a LoRA recipe of torchtune trained, for its own models and transformers'.

    The base is needed, torchtune's model or that of transformers, whose names and heads tell what
    the rows are.
    """
    file = path if path.is_file() else weights_in(path) or _last(path)
    if file is None:
        raise AdapterError(f"{path}: holds neither adapter_model.pt nor adapter_0.pt")
    config = read_config(file.with_name(CONFIG), hints.strict)
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"{file.with_name(CONFIG)}: peft_type is {config.peft_type}, not LORA")
    tensors = read_file(file, hints.allow_pickle)
    with within(file):
        if hints.base is None:
            raise AdapterError(
                "torchtune's names and rows, which are others than transformers'; pass base=, the "
                "model that it is for"
            )
        layers, base = sort_keys(tensors, DIALECT), hints.layers
        check_adapted(layers)
        updates: dict[str, AnyUpdate] = {}
        for own, roles in layers.items():
            with within(own):
                rank, scale = config.rank_and_scale(own)
                update = lora.read(roles, _FORM, scale=scale, rank=(rank, CONFIG))
                module = _module(own, base)
                updates[module] = update if module == own else _turned(update, module, base)
    return Adapter(name, updates)


def _last(directory: Path) -> Path | None:
    """The file of torchtune's own names, one an epoch, that was written last."""
    files = {path.stem.removeprefix("adapter_"): path for path in directory.glob("adapter_*.pt")}
    return files.get(max(filter(str.isdecimal, files), key=int, default="model"))


def _module(path: str, base: BaseLayers) -> str:
    """The module of the base that a path means: its own, or the one that ends as transformers'."""
    if path in base:
        return path
    end = ".".join(_NAMES.get(part, part) for part in path.split("."))
    found = [name for name in base if name == end or name.endswith(f".{end}")]
    if len(found) != 1:
        raise AdapterError(
            f"{shorten(found) or 'no layer'} of the base is called {end}, expected one: give the "
            "model that torchtune trained, its own or transformers'"
        )
    return found[0]


def _turned(update: Update, module: str, base: BaseLayers) -> Update:
    """An update of transformers' layer: the rows of a head as it has them."""
    heads = _HEADS.get(module.rpartition(".")[2])
    if heads is None:
        return update
    config: Any = getattr(base.base, "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    kind, count = getattr(config, "model_type", None), getattr(config, heads, None)
    if kind in _KEPT:
        return update
    if kind not in _TURNED or not isinstance(count, int) or update.shape[0] % (2 * count):
        raise AdapterError(
            f"the base is a {kind!r} of {count} heads: which rows of a head belong together is "
            f"known of {shorten(sorted(_TURNED | _KEPT))}; pass base=, a model of transformers, or "
            "let torchtune write PEFT's format"
        )
    rows = torch.arange(update.shape[0]).reshape(count, -1, 2).transpose(1, 2).flatten()
    magnitude = None if update.magnitude is None else update.magnitude[rows]
    return replace(update, up=update.up[rows], magnitude=magnitude)
