"""PEFT's directories: ``adapter_config.json`` beside ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import save

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.target_rule import pattern_matches
from lora_fx.errors import AdapterError, AdapterWarning, shorten, within
from lora_fx.formats.hints import Hints
from lora_fx.formats.peft.config import PeftConfig
from lora_fx.formats.peft.keys import is_own_key, sort_peft
from lora_fx.formats.peft.state_dicts import as_saved
from lora_fx.formats.peft.tokens import read_tokens
from lora_fx.formats.peft.traced import TracedConfig, parse_any
from lora_fx.formats.peft.write import contents
from lora_fx.io.atomic import publish
from lora_fx.io.shards import INDEX
from lora_fx.io.state_dict import read_file
from lora_fx.io.strict_json import read_object
from lora_fx.layers.base_layers import layers_of
from lora_fx.layers.resolve import Names

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"


def is_peft(path: Path, names: Collection[str]) -> bool:
    """Whether it is a directory: what is missing in it, the reader says."""
    return path.is_dir()


def read_peft(directory: Path, name: str, hints: Hints) -> Adapter:
    """Reads a PEFT adapter: every key of its file is used, or refused by name.

    Args:
        directory: holds ``adapter_config.json`` and the weights.
        name: of the adapter.
        hints: ``strict``, ``allow_pickle`` and ``base`` are heeded; the base tells what some files
            leave open: shapes of convolutions, order of parameters, tied heads.

    Raises:
        AdapterError: names the file, the tensor or field, and what is wrong with it.
    """
    config = read_config(_existing(directory, CONFIG), hints.strict)
    weights = weights_in(directory) or _existing(directory, WEIGHTS)
    tensors = read_file(weights, hints.allow_pickle)
    return assemble(name, weights, tensors, config, directory / CONFIG, hints)


def write_peft(adapter: Adapter, directory: Path, hints: Hints, force: bool) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors``, which PEFT loads.

    Updates of one kind are written as PEFT's type of that kind, with the very tensors that they
    were read from. Mixed kinds that all are plain products of two factors (LoRA, VeRA, AdaLoRA,
    LoHa) are written as LoRA of the products' rank; others are refused.

    Args:
        adapter: what to write.
        directory: what to create.
        hints: none is heeded.
        force: replace an adapter that is already there.

    Raises:
        AdapterError: the target exists, or PEFT's format cannot express the adapter.
    """
    with within(directory):
        config, tensors = contents(adapter)
    files = {
        CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        WEIGHTS: save(tensors, metadata={"format": "pt"}),
    }
    publish(directory, files, force)


def weights_in(directory: Path) -> Path | None:
    """The file of a directory that holds an adapter's tensors, or the index of several."""
    names = (WEIGHTS, WEIGHTS + INDEX, PICKLE, PICKLE + INDEX)
    return next((directory / name for name in names if (directory / name).exists()), None)


def read_config(path: Path, strict: bool) -> PeftConfig:
    """Reads and checks an ``adapter_config.json``.

    Raises:
        AdapterError: names the file and the field.
    """
    return parse_any(read_object(path), str(path), strict)


def assemble(
    name: str,
    weights: Path,
    tensors: Mapping[str, torch.Tensor],
    config: PeftConfig,
    origin: Path,
    hints: Hints,
) -> Adapter:
    """Makes an adapter of PEFT's tensors and the config that says what they mean.

    Args:
        name: of the adapter.
        weights: the file of the tensors.
        tensors: by PEFT's keys.
        config: what decides ranks, scales and uses.
        origin: where the config comes from.
        hints: ``strict`` refuses pattern keys that match nothing; ``base`` is heeded.

    Raises:
        AdapterError: names the file, the tensor or field, and what is wrong with it.
    """
    if isinstance(config, TracedConfig):  # PEFT itself is asked, in a room of its own
        from lora_fx.traced_adapters import read_traced

        return read_traced(name, weights, tensors, config, origin, hints)
    base = layers_of(hints.base)
    with within(weights):
        own = as_saved(tensors, lambda key: is_own_key(key, config))
        keys = sort_peft(own, config, base)
        if base.base is not None and not keys.layers.keys() <= base.layers.keys():
            base = Names.of(base).called(keys.layers)
        updates, asked = config.read(keys.layers, keys.shared, base)
        updates |= read_tokens(keys.tokens, config, base)
    _check_patterns(origin, config, asked, hints.strict)
    return Adapter(name, updates, keys.replacements, expects=config.rule)


def _existing(directory: Path, name: str) -> Path:
    path = directory / name
    if not path.is_file():
        raise AdapterError(f"{path}: no such file; a PEFT adapter is a directory that holds it")
    return path


def _check_patterns(origin: Path, config: PeftConfig, paths: list[str], strict: bool) -> None:
    """Refuses a pattern key that means no adapted module: a misspelt one changes the scale."""
    for field, pattern in config.patterns().items():
        unused = [key for key in pattern if not any(pattern_matches(key, path) for path in paths)]
        if not unused:
            continue
        message = f"{origin}: {field} has keys that match no adapted module: {shorten(unused)}"
        if strict:
            raise AdapterError(f"{message}; correct them, or pass strict=False")
        warnings.warn(message, AdapterWarning, stacklevel=5)
