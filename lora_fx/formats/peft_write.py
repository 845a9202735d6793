"""Adapters as PEFT directories, which PEFT loads with equal outputs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save

from lora_fx.adapter import Adapter
from lora_fx.errors import AdapterError, shorten
from lora_fx.formats.hints import Hints
from lora_fx.formats.peft_describe import describe, is_base_weight
from lora_fx.formats.peft_keys import DOWN, PREFIX, UP, UP_BIAS, saved_module
from lora_fx.formats.staging import publish
from lora_fx.formats.tensor_rules import check_tensors


def write_peft(adapter: Adapter, directory: Path, hints: Hints, force: bool) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        adapter: what to write.
        directory: what to create.
        hints: none is heeded.
        force: replace an adapter that is already there.

    Raises:
        AdapterError: the target exists, or PEFT's format cannot express the adapter.
    """
    config, tensors = contents(adapter, directory)
    files = {
        "adapter_config.json": (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        "adapter_model.safetensors": save(tensors, metadata={"format": "pt"}),
    }
    publish(directory, files, force)


def contents(adapter: Adapter, target: Path) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """The fields of PEFT's config and the tensors by PEFT's keys.

    Args:
        adapter: what to write.
        target: where to, for messages.

    Raises:
        AdapterError: PEFT cannot express the adapter.
    """
    _check_expressible(adapter, target)
    saved = _saved_modules(adapter)
    _check_saved(adapter, saved, target)
    tensors = _tensors(adapter, saved)
    check_tensors(target, tensors)
    return describe(adapter, saved), tensors


def _check_expressible(adapter: Adapter, directory: Path) -> None:
    if not adapter.updates:
        raise AdapterError(f"{directory}: the adapter {adapter.name} has no update to write")
    foreign = [p for p, update in adapter.updates.items() if update.kind not in ("lora", "rslora")]
    if foreign:
        raise AdapterError(f"{directory}: not LoRA, so not written as such: {shorten(foreign)}")
    loud = [p for p, update in adapter.updates.items() if not math.isfinite(update.scale)]
    if loud:
        raise AdapterError(f"{directory}: scales that are no finite number: {shorten(loud)}")
    reserved = [p for p in adapter.updates if {"base_layer", "token_adapter"} & set(p.split("."))]
    if reserved:
        raise AdapterError(f"{directory}: PEFT keeps these names for itself: {shorten(reserved)}")
    rootless = [name for name in adapter.replacements if "." not in name]
    if rootless:
        raise AdapterError(
            f"{directory}: PEFT cannot replace a parameter of the model itself, only of a module "
            f"in it: {shorten(rootless)}"
        )


def _saved_modules(adapter: Adapter) -> list[str]:
    """Modules to store whole: the outermost that own a replaced tensor other than a lone bias."""
    names = [name for name in adapter.replacements if not is_base_weight(adapter, name)]
    owners = {name.rpartition(".")[0] for name in names if not name.endswith(".bias")}
    return sorted(m for m in owners if not any(m.startswith(f"{other}.") for other in owners))


def _check_saved(adapter: Adapter, saved: list[str], directory: Path) -> None:
    clash = [path for path in adapter.updates if saved_module(path, saved)]
    if clash:
        raise AdapterError(
            f"{directory}: PEFT cannot both adapt and replace a module: {shorten(clash)} "
            f"beside the replaced {shorten(saved)}"
        )


def _tensors(adapter: Adapter, saved: list[str]) -> dict[str, torch.Tensor]:
    """Every tensor under PEFT's key; clones, for safetensors refuses shared memory."""
    has_bias = any(update.bias is not None for update in adapter.updates.values())
    tensors = {}
    for path, update in adapter.updates.items():
        tensors[PREFIX + path + DOWN] = update.down
        tensors[PREFIX + path + UP] = update.up
        if has_bias:
            zero = update.up.new_zeros(update.up.shape[0])
            tensors[PREFIX + path + UP_BIAS] = zero if update.bias is None else update.bias
    for name, tensor in adapter.replacements.items():
        module, _, leaf = name.rpartition(".")
        is_adapted = module in adapter.updates and not saved_module(module, saved)
        tensors[PREFIX + (f"{module}.base_layer.{leaf}" if is_adapted else name)] = tensor
    return {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
