"""What a config of PEFT says of one layer, as the kinds of ``lora_fx.kinds`` want to know it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from lora_fx.adapters.safe_regex import compile_bounded
from lora_fx.errors import AdapterError
from lora_fx.formats.peft_record import PeftConfig

Tensors = Mapping[str, torch.Tensor]


def options_alone(config: PeftConfig, path: str, tensors: Tensors) -> dict[str, Any]:
    """The type's own fields, and the rank if it has one."""
    rank = {"r": config.rank_and_scale(path)[0]} if config.type.rank else {}
    return {**dataclasses.asdict(config.options), **rank}


def scaled(config: PeftConfig, path: str, tensors: Tensors) -> dict[str, Any]:
    """LoHa and LoKr: the scale is alpha / r, after both patterns."""
    rank, scale = config.rank_and_scale(path)
    own = {"r": rank, "alpha": config.alpha_of(path), "scale": scale, "writer": "peft"}
    return {**dataclasses.asdict(config.options), **own}


def adalora(config: PeftConfig, path: str, tensors: Tensors) -> dict[str, Any]:
    """AdaLoRA: alpha is the scale, divided by the rank before the pruning."""
    rank = config.rank_and_scale(path)[0]
    scale = config.alpha if config.alpha > 0 else rank
    mask = config.masks.get(path)
    return {"scale": scale, "ranknum": config.r, "alpha": config.alpha, "mask": mask}


def feedforward(config: PeftConfig, path: str, tensors: Tensors) -> dict[str, Any]:
    """(IA)3: whether the layer is scaled at its input; PEFT compares ends without a dot."""
    modules = config.options.feedforward_modules
    if modules is None:
        shape = tuple(tensors["ia3_l"].shape) if "ia3_l" in tensors else ()
        if len(shape) != 2 or shape[0] == shape[1]:
            raise AdapterError(
                f"feedforward_modules is missing, and ia3_l {shape} of {path} does not tell "
                "whether the layer is one; add the field to the config"
            )
        return {"feedforward": shape[0] == 1}
    if isinstance(modules, str):
        pattern = compile_bounded(modules, "feedforward_modules")
        return {"feedforward": pattern.fullmatch(path) is not None}
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise AdapterError(f"feedforward_modules is {modules!r:.80}, expected a list of names")
    return {"feedforward": path.endswith(tuple(modules))}


def tokens(config: PeftConfig, path: str, tensors: Tensors) -> dict[str, Any]:
    """Trainable tokens: which they are."""
    return {"indices": list(config.options.token_indices)}
