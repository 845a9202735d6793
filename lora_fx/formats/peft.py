"""PEFT's directories: ``adapter_config.json`` beside ``adapter_model.safetensors``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from lora_fx.adapter import Adapter, Update
from lora_fx.errors import AdapterError, AdapterWarning, shorten
from lora_fx.formats.hints import Hints
from lora_fx.formats.peft_config import PeftLora, read_config
from lora_fx.formats.peft_keys import SortedKeys, sort_keys
from lora_fx.formats.pickle_file import read_pickle
from lora_fx.formats.safetensors_file import read_tensors
from lora_fx.targets import pattern_matches

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"


def read_peft(directory: Path, name: str, hints: Hints) -> Adapter:
    """Reads a PEFT LoRA adapter: every key of its file is used, or refused by name.

    Args:
        directory: holds ``adapter_config.json`` and the weights.
        name: of the adapter.
        hints: ``strict`` and ``allow_pickle`` are heeded.

    Raises:
        AdapterError: names the file, the tensor or field, and what is wrong with it.
    """
    config = read_config(_existing(directory, CONFIG), hints.strict)
    weights, tensors = _read_weights(directory, hints)
    keys = sort_keys(weights, tensors, config)
    updates = {path: _update(weights, path, keys, config) for path in keys.down}
    _check_patterns(directory / CONFIG, config, list(updates), hints.strict)
    adapter = Adapter(name, updates, keys.replacements, expects=config.rule)
    if not keys.replacements and not any(update.has_effect() for update in updates.values()):
        warnings.warn(
            f"{weights}: the adapter has no effect: every update is zero; was it trained?",
            AdapterWarning,
            stacklevel=3,
        )
    return adapter


def _existing(directory: Path, name: str) -> Path:
    path = directory / name
    if not path.is_file():
        raise AdapterError(f"{path}: no such file; a PEFT adapter is a directory that holds it")
    return path


def _read_weights(directory: Path, hints: Hints) -> tuple[Path, dict[str, torch.Tensor]]:
    pickle = directory / PICKLE
    if (directory / WEIGHTS).exists() or not pickle.exists():
        weights = _existing(directory, WEIGHTS)
        return weights, read_tensors(weights)
    if not hints.allow_pickle:
        raise AdapterError(
            f"{pickle}: a pickle can run code when it is opened; save the adapter as safetensors, "
            "or pass allow_pickle=True if you trust the file"
        )
    return pickle, read_pickle(_existing(directory, PICKLE))


def _update(weights: Path, path: str, keys: SortedKeys, config: PeftLora) -> Update:
    """The update of one module; its shapes and rank must agree with each other and the config."""
    down, up, bias = keys.down[path], keys.up[path], keys.up_bias.get(path)
    where = f"{weights}: {path}"
    if down.ndim != 2 or up.ndim != 2:
        raise AdapterError(
            f"{where}: lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)} are not matrices; "
            "only linear layers are supported"
        )
    rank, scale = config.rank_and_scale(path)
    if down.shape[0] != rank or up.shape[1] != rank:
        raise AdapterError(
            f"{where}: lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)} should be of rank "
            f"{rank} by r or rank_pattern: (r, in) and (out, r)"
        )
    if bias is not None and bias.shape != (up.shape[0],):
        raise AdapterError(
            f"{where}: lora_B.bias {tuple(bias.shape)}, expected ({up.shape[0]},) as in lora_B"
        )
    kind = "rslora" if config.use_rslora else "lora"
    return Update(down, up, scale, kind, bias)


def _check_patterns(origin: Path, config: PeftLora, paths: list[str], strict: bool) -> None:
    """Refuses a pattern key that means no adapted module: a misspelt one changes the scale."""
    patterns: dict[str, Mapping[str, object]] = {
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
    }
    for field, pattern in patterns.items():
        unused = [key for key in pattern if not any(pattern_matches(key, path) for path in paths)]
        if not unused:
            continue
        message = f"{origin}: {field} has keys that match no adapted module: {shorten(unused)}"
        if strict:
            raise AdapterError(f"{message}; correct them, or pass strict=False")
        warnings.warn(message, AdapterWarning, stacklevel=4)
