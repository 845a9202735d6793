"""The keys of a PEFT file, each sorted to its use or refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lora_fx.errors import AdapterError, shorten
from lora_fx.formats.peft_config import PeftLora

PREFIX = "base_model.model."
DOWN = ".lora_A.weight"
UP = ".lora_B.weight"
UP_BIAS = ".lora_B.bias"
BASE_BIAS = ".base_layer.bias"
# PEFT stores an adapted head whole, beside its adapter, in case the vocabulary was resized.
BASE_WEIGHT = ".base_layer.weight"
# Under bias='all' PEFT also stores copies of a saved module's biases under these, without a use.
COPIES = ("original_module", "modules_to_save")
# What a part of a key says about features that are not supported.
FOREIGN = {
    ".base_layer.lora_": "an adapter nested in another (target_parameters)",
    ".lora_embedding_": "an embedding's adapter",
    ".lora_magnitude_vector": "DoRA",
    ".lora_E": "AdaLoRA",
    ".token_adapter.": "trainable tokens",
}


@dataclass
class SortedKeys:
    """The tensors of a PEFT file by use: module path -> tensor, or parameter path -> tensor."""

    down: dict[str, torch.Tensor] = field(default_factory=dict)
    up: dict[str, torch.Tensor] = field(default_factory=dict)
    up_bias: dict[str, torch.Tensor] = field(default_factory=dict)
    replacements: dict[str, torch.Tensor] = field(default_factory=dict)


def sort_keys(file: Path, tensors: Mapping[str, torch.Tensor], config: PeftLora) -> SortedKeys:
    """Sorts every tensor of a file to its use.

    Raises:
        AdapterError: a key without a use, half of a pair, or a part that the config promises.
    """
    keys = SortedKeys()
    paths = {key: key.removeprefix(PREFIX) for key in tensors if key.startswith(PREFIX)}
    adapted = {path.removesuffix(DOWN) for path in paths.values() if path.endswith(DOWN)}
    unused = []
    for key, tensor in tensors.items():
        _refuse_foreign(file, key)
        path = paths.get(key)
        if path is None or not _sort(path, tensor, config, adapted, keys):
            unused.append(key)
    if unused:
        raise AdapterError(
            f"{file}: {len(unused)} tensors that the config gives no use: {shorten(unused)}; "
            f"expected {PREFIX}<module>{DOWN} and its kin, biases by the field bias, and modules "
            "by modules_to_save"
        )
    _check_pairs(file, keys, config)
    _check_saved(file, keys, config)
    return keys


def saved_module(path: str, modules: Sequence[str]) -> str | None:
    """The first module on the way to a path that ``modules_to_save`` means, as PEFT matches it.

    PEFT compares ends without asking for a dot: ``head`` means ``lm_head`` too.
    """
    parts = path.split(".")
    prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return next((p for p in prefixes if p.endswith(tuple(modules))), None)


def _refuse_foreign(file: Path, key: str) -> None:
    feature = next((FOREIGN[part] for part in FOREIGN if part in key), None)
    if feature is not None:
        raise AdapterError(f"{file}: tensor {key!r} is {feature}, which is not supported")


def _sort(
    path: str, tensor: torch.Tensor, config: PeftLora, adapted: set[str], keys: SortedKeys
) -> bool:
    """Puts one tensor where it belongs; False when the config gives it no use."""
    uses = {DOWN: keys.down, UP: keys.up, UP_BIAS: keys.up_bias}
    for suffix, tensors_by_path in uses.items():
        if path.endswith(suffix) and (suffix != UP_BIAS or config.lora_bias):
            tensors_by_path[path.removesuffix(suffix)] = tensor
            return True
    if config.bias == "all" and _is_copy(path, config):
        return True
    owner = path.removesuffix(BASE_WEIGHT)
    if not (owner in adapted and owner != path) and not _is_replacement(path, config, adapted):
        return False
    target = path.replace(".base_layer.", ".") if path.endswith((BASE_BIAS, BASE_WEIGHT)) else path
    is_first = target not in keys.replacements
    keys.replacements[target] = tensor
    return is_first


def _is_copy(path: str, config: PeftLora) -> bool:
    parts = path.split(".")
    at = next((index for index, part in enumerate(parts) if part in COPIES), 0)
    is_saved = saved_module(".".join(parts[:at]), config.modules_to_save) is not None
    return at > 0 and is_saved and path.endswith(".bias")


def _is_replacement(path: str, config: PeftLora, adapted: set[str]) -> bool:
    module, _, leaf = path.rpartition(".")
    if module and saved_module(module, config.modules_to_save):
        return True
    if leaf != "bias" or ".lora_" in path or config.bias == "none":
        return False
    owner = path.removesuffix(BASE_BIAS) if path.endswith(BASE_BIAS) else module
    return owner in adapted or (config.bias == "all" and owner == module)


def _check_pairs(file: Path, keys: SortedKeys, config: PeftLora) -> None:
    """Refuses A without B, B without A, and a bias missing on either side."""
    if not keys.down and not keys.up:
        raise AdapterError(f"{file}: no {PREFIX}<module>{DOWN} in it, so nothing is adapted")
    without_up = [path + DOWN for path in keys.down if path not in keys.up]
    without_down = [path + UP for path in keys.up if path not in keys.down]
    if without_up or without_down:
        raise AdapterError(
            f"{file}: half of a pair, lora_A without lora_B or the reverse: "
            f"{shorten(without_up + without_down)}"
        )
    wanted = set(keys.down) if config.lora_bias else set()
    odd = sorted(wanted ^ set(keys.up_bias))
    if odd:
        raise AdapterError(
            f"{file}: lora_bias is {config.lora_bias}, but lora_B.bias is not found, or has no "
            f"lora_A, at: {shorten(odd)}"
        )


def _check_saved(file: Path, keys: SortedKeys, config: PeftLora) -> None:
    """Refuses a module that the config says is stored whole but the file lacks, and a clash."""
    modules = [name.rpartition(".")[0] for name in keys.replacements]
    for name in config.modules_to_save:
        if name not in config.optional_heads and not any(saved_module(m, [name]) for m in modules):
            raise AdapterError(f"{file}: modules_to_save names {name!r}, but no tensor is of it")
    clash = [path for path in keys.down if saved_module(path, config.modules_to_save)]
    if clash:
        raise AdapterError(
            f"{file}: both adapted and stored whole by modules_to_save: {shorten(clash)}"
        )
