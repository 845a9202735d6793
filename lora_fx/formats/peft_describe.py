"""The config of which PEFT makes the same ranks, scales and targets as an adapter has."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable

from lora_fx.adapter import Adapter, Update
from lora_fx.formats.alphas import alpha_for
from lora_fx.formats.peft_keys import saved_module
from lora_fx.safe_regex import MAX_LENGTH


def describe(adapter: Adapter, saved: list[str]) -> dict[str, object]:
    """Makes the fields of an ``adapter_config.json``.

    Args:
        adapter: what the config is of.
        saved: paths of the modules stored whole.

    Returns:
        The fields; one r and one alpha, and patterns for the modules that differ.
    """
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
    return alpha_for(update.scale, math.sqrt(update.rank) if use_rslora else update.rank)


def _pattern(values: dict[str, float], default: float) -> dict[str, float]:
    """The values that are not the default; PEFT matches ends of paths, the ``^`` whole ones."""
    return {f"^{re.escape(p)}": value for p, value in values.items() if value != default}


def _most_common(values: Iterable[float]) -> float:
    [(value, _)] = Counter(values).most_common(1)
    return value


def _bias_mode(adapter: Adapter, saved: list[str]) -> str:
    names = [name for name in adapter.replacements if not is_base_weight(adapter, name)]
    modules = [name.rpartition(".")[0] for name in names]
    alone = [m for m in modules if not saved_module(m, saved)]
    if not alone:
        return "none"
    return "lora_only" if all(module in adapter.updates for module in alone) else "all"


def is_base_weight(adapter: Adapter, name: str) -> bool:
    """Whether a replaced tensor is the weight of a layer that the adapter updates as well."""
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and module in adapter.updates
