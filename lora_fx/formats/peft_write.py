"""Adapters as PEFT directories, which PEFT loads with equal outputs."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save

from lora_fx.adapter import Adapter, Update
from lora_fx.errors import AdapterError, shorten
from lora_fx.formats.peft_keys import BASE_BIAS, DOWN, PREFIX, UP, UP_BIAS, saved_module
from lora_fx.formats.staging import publish
from lora_fx.formats.tensor_rules import check_tensors
from lora_fx.safe_regex import MAX_LENGTH


def write_peft(adapter: Adapter, directory: Path, force: bool) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        adapter: what to write.
        directory: what to create.
        force: replace an adapter that is already there.

    Raises:
        AdapterError: the target exists, or PEFT's format cannot express the adapter.
    """
    _check_expressible(adapter, directory)
    saved = _saved_modules(adapter)
    _check_saved(adapter, saved, directory)
    tensors = _tensors(adapter, saved)
    check_tensors(directory, tensors)
    config = _config(adapter, saved)
    files = {
        "adapter_config.json": (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        "adapter_model.safetensors": save(tensors, metadata={"format": "pt"}),
    }
    publish(directory, files, force)


def _check_expressible(adapter: Adapter, directory: Path) -> None:
    if not adapter.updates:
        raise AdapterError(f"{directory}: the adapter {adapter.name} has no update to write")
    foreign = [p for p, update in adapter.updates.items() if update.kind not in ("lora", "rslora")]
    if foreign:
        raise AdapterError(f"{directory}: not LoRA, so not written as such: {shorten(foreign)}")
    rootless = [name for name in adapter.replacements if "." not in name]
    if rootless:
        raise AdapterError(
            f"{directory}: PEFT cannot replace a parameter of the model itself, only of a module "
            f"in it: {shorten(rootless)}"
        )


def _saved_modules(adapter: Adapter) -> list[str]:
    """Modules to store whole: the outermost that own a replaced tensor other than a lone bias."""
    names = list(adapter.replacements)
    owners = {name.rpartition(".")[0] for name in names if not name.endswith(".bias")}
    return sorted(m for m in owners if not any(m.startswith(f"{other}.") for other in owners))


def _check_saved(adapter: Adapter, saved: list[str], directory: Path) -> None:
    clash = [path for path in adapter.updates if saved and saved_module(path, saved)]
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
        module, _, _ = name.rpartition(".")
        is_adapted = module in adapter.updates and not (saved and saved_module(module, saved))
        tensors[PREFIX + (module + BASE_BIAS if is_adapted else name)] = tensor
    return {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }


def _config(adapter: Adapter, saved: list[str]) -> dict[str, object]:
    """The config of which PEFT makes the same ranks, scales and targets."""
    updates = adapter.updates
    use_rslora = all(update.kind == "rslora" for update in updates.values())
    ranks: dict[str, float] = {path: update.rank for path, update in updates.items()}
    alphas = {path: _alpha(update, use_rslora) for path, update in updates.items()}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "use_rslora": use_rslora,
        "lora_dropout": 0.0,
        "lora_bias": any(update.bias is not None for update in updates.values()),
        "bias": _bias_mode(adapter, saved),
        "modules_to_save": saved or None,
        "init_lora_weights": True,
        "fan_in_fan_out": False,
        **_targets(adapter),
    }


def _targets(adapter: Adapter) -> dict[str, object]:
    """The adapter's own rule where it says more than its paths do, else the paths."""
    rule = adapter.expects
    if rule is None or rule.is_all_linear or not all(map(rule.matches, adapter.updates)):
        return {"target_modules": _exact_targets(sorted(adapter.updates))}
    return {
        "target_modules": rule.target_modules,
        "exclude_modules": rule.exclude_modules or None,
        "layers_to_transform": rule.layers_to_transform,
        "layers_pattern": rule.layers_pattern or None,
    }


def _exact_targets(paths: list[str]) -> str | list[str]:
    """The paths as a list, which most programs read, or as a regex where a list means too much.

    In a list ``fc`` means ``block.fc`` too, so a layer at the root asks for a regex, if it fits.
    """
    regex = "|".join(re.escape(path) for path in paths)
    at_root = any("." not in path for path in paths)
    return regex if at_root and len(regex) <= MAX_LENGTH else paths


def _alpha(update: Update, use_rslora: bool) -> float:
    """The alpha that PEFT divides back into this scale, a whole number if one does.

    Exact for every scale that was alpha / r of the same kind; another may move by its last bit,
    for division by r does not reach every float.
    """
    divisor = math.sqrt(update.rank) if use_rslora else update.rank
    alpha = update.scale * divisor
    near = (round(alpha), alpha, math.nextafter(alpha, -math.inf), math.nextafter(alpha, math.inf))
    return min(near, key=lambda candidate: abs(candidate / divisor - update.scale))


def _pattern(values: dict[str, float], default: float) -> dict[str, float]:
    """The values that are not the default; PEFT matches ends of paths, the ``^`` whole ones."""
    return {f"^{re.escape(p)}": value for p, value in values.items() if value != default}


def _most_common(values: Iterable[float]) -> float:
    [(value, _)] = Counter(values).most_common(1)
    return value


def _bias_mode(adapter: Adapter, saved: list[str]) -> str:
    modules = [name.rpartition(".")[0] for name in adapter.replacements]
    alone = [m for m in modules if not (saved and saved_module(m, saved))]
    if not alone:
        return "none"
    return "lora_only" if all(module in adapter.updates for module in alone) else "all"
