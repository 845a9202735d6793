"""An adapter as the state dict of a model of loralib's layers."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.adapters.scaling import alpha_for
from lora_fx.adapters.updates import Update
from lora_fx.errors import AdapterError, shorten
from lora_fx.formats.expressible import check_held, not_lora
from lora_fx.formats.hints import Hints
from lora_fx.formats.loralib.layers import LEAVES, as_points

# Keys of the safetensors metadata, ours: loralib keeps both in the model's constructor.
ALPHAS, FUSED = "lora_alpha", "enable_lora"
PICKLES = (".pt", ".pth", ".bin")
Tensors = dict[str, torch.Tensor]


def contents(adapter: Adapter, path: Path, hints: Hints) -> tuple[Tensors, dict[str, str]]:
    """A state dict that a model of loralib's layers loads, and texts beside.

    Tensors that loralib wrote are written as they were; another product of two factors becomes
    that of its ``Linear``, ``Embedding`` or ``Conv2d`` layer. A ``.pt`` holds the tensors alone,
    so all layers must have one alpha, which the reader has to know, as it has to know what is
    fused; a ``.safetensors`` holds both in its metadata. rsLoRA becomes the alpha that gives its
    scale over the rank.
    """
    others = [key for key in adapter.replacements if not key.endswith(".bias")]
    check_held(adapter, "loralib's format", others, _problem)
    alphas = {module: _alpha(update) for module, update in adapter.updates.items()}
    if path.suffix in PICKLES and len(set(alphas.values())) > 1:
        found = shorten([f"{p}: {alpha:g}" for p, alpha in alphas.items()])
        raise AdapterError(f"its layers have several alphas ({found}): write .safetensors")
    tensors = dict(adapter.replacements)
    fused = {}
    for module, update in adapter.updates.items():
        own = update.stored_tensors if _is_own(update) else _pair(update)
        tensors |= {f"{module}.{leaf}": tensor for leaf, tensor in own.items()}
        if _is_own(update) and FUSED in update.stored_settings:
            fused[module] = update.stored_settings[FUSED]
    metadata = {ALPHAS: json.dumps(alphas)}
    return tensors, metadata | ({FUSED: json.dumps(fused)} if fused else {})


def _problem(update: AnyUpdate) -> str | None:
    if _is_own(update):
        return None
    found = not_lora(update)
    if found is not None or not isinstance(update, Update):
        return found
    if update.magnitude is not None:
        return "DoRA"
    if update.groups > 1:
        return "grouped up-projections"
    kernel = update.down.shape[2:]
    is_square = len(kernel) == 2 and len(set(kernel)) == 1
    if not is_square and any(size > 1 for size in kernel):
        return f"updates of kernels such as {tuple(kernel)}"
    return None


def _is_own(update: AnyUpdate) -> bool:
    return update.stored_tensors.keys() == LEAVES


def _alpha(update: AnyUpdate) -> float:
    settings = update.stored_settings if _is_own(update) else {}
    if not isinstance(update, Update):
        return float(settings["alpha"])
    if settings.get("scale") == update.scale:
        return float(settings["alpha"])
    return alpha_for(update.scale, settings.get("r", update.rank))


def _pair(update: AnyUpdate) -> dict[str, torch.Tensor]:
    """lora_A and lora_B of a product of two factors."""
    assert isinstance(update, Update)
    kernel = update.down.shape[2:]
    size = kernel[0] if kernel else 1
    down = update.down.reshape(update.rank * size, -1)
    return {"lora_A": down, "lora_B": as_points(update.up, size) if size > 1 else update.up}
