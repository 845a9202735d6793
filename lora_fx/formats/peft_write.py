"""Adapters as PEFT directories, which PEFT loads with equal outputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.adapters.updates import Update
from lora_fx.errors import AdapterError, shorten, within
from lora_fx.formats.hints import Hints
from lora_fx.formats.peft_chosen import Chosen, check_expressible, choose
from lora_fx.formats.peft_describe import describe_chosen, is_base_weight
from lora_fx.formats.peft_keys import SHARED
from lora_fx.formats.peft_lora import lora_tensors
from lora_fx.formats.peft_paths import Home, homes_of
from lora_fx.formats.peft_replaced import PREFIX, TOKEN_BASE, TOKENS, saved_module
from lora_fx.formats.peft_types import LORA
from lora_fx.formats.peft_vera import is_drawn_again, shared_by
from lora_fx.io.atomic import publish
from lora_fx.io.tensor_checks import check_tensors

Tensors = dict[str, torch.Tensor]
CORES = ("hada_t1", "hada_t2")


def write_peft(adapter: Adapter, directory: Path, hints: Hints, force: bool) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors``.

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
        "adapter_config.json": (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        "adapter_model.safetensors": save(tensors, metadata={"format": "pt"}),
    }
    publish(directory, files, force)


def contents(adapter: Adapter) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """The fields of PEFT's config and the tensors by PEFT's keys.

    Args:
        adapter: what to write.

    Raises:
        AdapterError: PEFT cannot express the adapter.
    """
    chosen = choose(adapter)
    check_expressible(chosen)
    homes = homes_of(chosen.layers)
    saved = _saved_modules(adapter)
    _check_saved(adapter, saved)
    fields = describe_chosen(chosen, homes, saved)
    tensors = _adapter_tensors(chosen, homes) | _base_tensors(chosen, homes, saved)
    # Clones, for safetensors refuses shared memory.
    tensors = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    check_tensors(tensors)
    return fields, tensors


def _saved_modules(adapter: Adapter) -> list[str]:
    """Modules to store whole: the outermost that own a replaced tensor other than a lone bias."""
    names = [name for name in adapter.replacements if not is_base_weight(adapter, name)]
    owners = {name.rpartition(".")[0] for name in names if not name.endswith(".bias")}
    return sorted(m for m in owners if not any(m.startswith(f"{other}.") for other in owners))


def _check_saved(adapter: Adapter, saved: list[str]) -> None:
    clash = [path for path in adapter.updates if saved_module(path, saved)]
    if clash:
        raise AdapterError(
            f"PEFT cannot both adapt and replace a module: {shorten(clash)} "
            f"beside the replaced {shorten(saved)}"
        )


def _adapter_tensors(chosen: Chosen, homes: Mapping[str, Home]) -> Tensors:
    """The tensors of the updates under PEFT's keys."""
    tensors: Tensors = {}
    low = list(chosen.low.values())
    has_bias = any(update.bias is not None for update in low)
    for path, update in chosen.layers.items():
        key = PREFIX + homes[path].key
        if chosen.type is LORA and isinstance(update, Update):
            own = lora_tensors(update, has_bias)
        else:
            own = {leaf: t for leaf, t in stored_of(update).items() if leaf in chosen.type.leaves}
            # PEFT's cores have two axes for the kernel, LyCORIS' one where that has one.
            own |= {leaf: t[..., None] for leaf, t in own.items() if leaf in CORES and t.ndim == 3}
        tensors |= {f"{key}.{leaf}": tensor for leaf, tensor in own.items()}
    if chosen.type.name == "VERA":
        tensors |= _shared(chosen)
    for path, update in chosen.tokens.items():
        tensors[PREFIX + path + TOKENS] = stored_of(update)["trainable_tokens_delta"]
    return tensors


def stored_of(update: AnyUpdate) -> Mapping[str, torch.Tensor]:
    """What the file held of a layer that was read from one."""
    return {} if update.stored is None else update.stored.tensors


def _shared(chosen: Chosen) -> Tensors:
    """VeRA's projections, if the file is to hold them."""
    shared = None if is_drawn_again(chosen.layers) else shared_by(chosen.layers)
    return {} if shared is None else {key: shared[leaf] for key, leaf in SHARED.items()}


def _base_tensors(chosen: Chosen, homes: Mapping[str, Home], saved: list[str]) -> Tensors:
    """The replaced tensors: of a wrapped module inside of its wrapper."""
    tensors: Tensors = {}
    for name, tensor in chosen.adapter.replacements.items():
        module, _, leaf = name.rpartition(".")
        key = name
        if module in chosen.tokens:
            key = f"{module}{TOKEN_BASE}{leaf}"
        elif module in homes and not saved_module(module, saved):
            key = f"{homes[module].key}.base_layer.{leaf}"
        tensors[PREFIX + key] = tensor
    return tensors
