"""PEFT's directories: ``adapter_config.json`` beside ``adapter_model.safetensors``."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from lora_fx.adapter import Adapter, Update
from lora_fx.errors import AdapterError, AdapterWarning, shorten
from lora_fx.formats.hints import Hints
from lora_fx.formats.peft_config import PeftLora, read_config
from lora_fx.formats.peft_keys import SortedKeys, sort_keys
from lora_fx.formats.tensor_file import read_file
from lora_fx.targets import pattern_matches

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"


def is_peft(path: Path, names: Collection[str]) -> bool:
    """Whether it is a directory: what is missing in it, the reader says."""
    return path.is_dir()


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
    weights = directory / WEIGHTS
    if not weights.exists() and (directory / PICKLE).exists():
        weights = directory / PICKLE
    tensors = read_file(_existing(directory, weights.name), hints)
    return assemble(name, weights, tensors, config, directory / CONFIG, hints.strict)


def assemble(
    name: str,
    weights: Path,
    tensors: Mapping[str, torch.Tensor],
    config: PeftLora,
    origin: Path,
    strict: bool,
) -> Adapter:
    """Makes an adapter of PEFT's tensors and the config that says what they mean.

    Args:
        name: of the adapter.
        weights: the file of the tensors, for messages.
        tensors: by PEFT's keys.
        config: what decides ranks, scales and uses.
        origin: where the config comes from, for messages.
        strict: refuse pattern keys that match nothing.

    Raises:
        AdapterError: names the file, the tensor or field, and what is wrong with it.
    """
    keys = sort_keys(weights, tensors, config)
    updates = {path: _update(weights, path, keys, config) for path in keys.down}
    _check_patterns(origin, config, list(updates), strict)
    return Adapter(name, updates, keys.replacements, expects=config.rule)


def _existing(directory: Path, name: str) -> Path:
    path = directory / name
    if not path.is_file():
        raise AdapterError(f"{path}: no such file; a PEFT adapter is a directory that holds it")
    return path


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
        warnings.warn(message, AdapterWarning, stacklevel=5)
