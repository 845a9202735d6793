"""The tensors of a PEFT file that take the place of the base's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lora_fx.formats.peft_record import PeftConfig

PREFIX = "base_model.model."
BASE_BIAS = ".base_layer.bias"
# PEFT stores an adapted head whole, beside its adapter, in case the vocabulary was resized.
BASE_WEIGHT = ".base_layer.weight"
TOKENS = ".token_adapter.trainable_tokens_delta"
TOKEN_BASE = ".token_adapter.base_layer."
# Under bias='all' PEFT also stores copies of a saved module's biases under these, without a use.
COPIES = ("original_module", "modules_to_save")


@dataclass
class SortedKeys:
    """The tensors of a PEFT file by use.

    Attributes:
        layers: module path, as the file has it -> the tensors of its adapter, by leaf.
        shared: what all layers share, by leaf.
        tokens: path of a table -> its trained rows.
        replacements: parameter path -> tensor.
    """

    layers: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    shared: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)
    replacements: dict[str, torch.Tensor] = field(default_factory=dict)


def saved_module(path: str, modules: Sequence[str]) -> str | None:
    """The first module on the way to a path that ``modules_to_save`` means, as PEFT matches it.

    PEFT compares ends without asking for a dot: ``head`` means ``lm_head`` too.
    """
    parts = path.split(".")
    prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return next((p for p in prefixes if p.endswith(tuple(modules))), None)


def sort_base(key: str, tensor: torch.Tensor, config: PeftConfig, keys: SortedKeys) -> bool:
    """Puts a tensor of the base where it belongs; False when the config gives it no use."""
    path = key.removeprefix(PREFIX)
    if path == key:
        return False
    if config.bias == "all" and _is_copy(path, config):
        return True
    owner = path.removesuffix(BASE_WEIGHT)
    whole = owner != path and owner in keys.layers
    if not whole and not _is_replacement(path, config, keys):
        return False
    target = path.replace(TOKEN_BASE, ".")
    if path.endswith((BASE_BIAS, BASE_WEIGHT)):
        target = target.replace(".base_layer.", ".")
    is_first = target not in keys.replacements
    keys.replacements[target] = tensor
    return is_first


def sort_tied(key: str, tensor: torch.Tensor, config: PeftConfig, keys: SortedKeys) -> bool:
    """A copy of a module stored whole, for the head that ensure_weight_tying ties to it."""
    path = key.removeprefix(PREFIX)
    is_copy = any(
        value.shape == tensor.shape and torch.equal(value, tensor)
        for name, value in keys.replacements.items()
        if saved_module(name.rpartition(".")[0], config.modules_to_save)
    )
    if not config.ties or path == key or not path.endswith(".weight") or not is_copy:
        return False
    keys.replacements[path] = tensor
    return True


def _is_copy(path: str, config: PeftConfig) -> bool:
    parts = path.split(".")
    at = next((index for index, part in enumerate(parts) if part in COPIES), 0)
    is_saved = saved_module(".".join(parts[:at]), config.modules_to_save) is not None
    return at > 0 and is_saved and path.endswith(".bias")


def _is_replacement(path: str, config: PeftConfig, keys: SortedKeys) -> bool:
    module, _, leaf = path.rpartition(".")
    if module and saved_module(module, config.modules_to_save):
        return True
    if TOKEN_BASE in path:
        return path.partition(TOKEN_BASE)[0] in keys.tokens
    if leaf != "bias" or ".lora_" in path or config.bias == "none":
        return False
    owner = path.removesuffix(BASE_BIAS) if path.endswith(BASE_BIAS) else module
    return owner in keys.layers or (config.bias == "all" and owner == module)
