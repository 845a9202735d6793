"""The keys of a PEFT file, each sorted to its use or refused by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lora_fx.errors import AdapterError, shorten
from lora_fx.formats.peft_record import PeftConfig
from lora_fx.formats.peft_replaced import (
    PREFIX,
    TOKENS,
    SortedKeys,
    saved_module,
    sort_base,
    sort_tied,
)

# VeRA's projections, which all layers share.
SHARED = {"base_model.vera_A": "vera_A", "base_model.vera_B": "vera_B"}


def sort_keys(tensors: Mapping[str, torch.Tensor], config: PeftConfig) -> SortedKeys:
    """Sorts every tensor of a file to its use.

    Raises:
        AdapterError: a key without a use, or a part that the config promises.
    """
    keys, rest = SortedKeys(), dict[str, torch.Tensor]()
    for key, tensor in tensors.items():
        if not _sort_adapter(key, tensor, config, keys):
            rest[key] = tensor
    unused = [key for key, tensor in rest.items() if not sort_base(key, tensor, config, keys)]
    unused = [key for key in unused if not sort_tied(key, rest[key], config, keys)]
    if unused:
        expected = ", ".join(f".{leaf}" for leaf in config.leaves)
        raise AdapterError(
            f"{len(unused)} tensors that the config gives no use: {shorten(unused)}; "
            f"expected {PREFIX}<module> and one of {expected} under {config.type.name}, biases by "
            "the field bias, and modules by modules_to_save"
        )
    if not keys.layers and not keys.tokens:
        raise AdapterError(f"no {PREFIX}<module>.{config.leaves[0]} in it, so nothing is adapted")
    _check_saved(keys, config)
    return keys


def _sort_adapter(key: str, tensor: torch.Tensor, config: PeftConfig, keys: SortedKeys) -> bool:
    """Puts a tensor of the adapter's own where it belongs; False for any other."""
    if key in SHARED and config.type.name == "VERA":
        keys.shared[SHARED[key]] = tensor
        return True
    if not key.startswith(PREFIX):
        return False
    path = key.removeprefix(PREFIX)
    if path.endswith(TOKENS) and config.tokens is not None:
        keys.tokens[path.removesuffix(TOKENS)] = tensor
        return True
    leaf = next((leaf for leaf in config.leaves if path.endswith(f".{leaf}")), None)
    if leaf is None:
        return False
    keys.layers.setdefault(path.removesuffix(f".{leaf}"), {})[leaf] = tensor
    return True


def _check_saved(keys: SortedKeys, config: PeftConfig) -> None:
    """Refuses a module that the config says is stored whole but the file lacks, and a clash."""
    modules = [name.rpartition(".")[0] for name in keys.replacements]
    for name in config.modules_to_save:
        if name not in config.optional_heads and not any(saved_module(m, [name]) for m in modules):
            raise AdapterError(f"modules_to_save names {name!r}, but no tensor is of it")
    clash = [path for path in keys.layers if saved_module(path, config.modules_to_save)]
    clash += [path for path in keys.tokens if path in keys.layers]
    if clash:
        raise AdapterError(
            f"both adapted and stored whole, by modules_to_save or as tokens: {shorten(clash)}"
        )
