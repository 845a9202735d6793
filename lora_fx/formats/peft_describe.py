"""The config of which PEFT makes the same ranks, scales and targets as an adapter has."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.safe_regex import MAX_LENGTH
from lora_fx.errors import AdapterError, shorten
from lora_fx.formats.peft_chosen import Chosen
from lora_fx.formats.peft_options import options_of, settings_of
from lora_fx.formats.peft_paths import Home, homes_of
from lora_fx.formats.peft_ranks import is_rslora, ranks_of
from lora_fx.formats.peft_replaced import saved_module
from lora_fx.formats.peft_types import LORA

Fields = dict[str, object]
# Whose format it is: PEFT takes the files of OFT that do not say for those of older formulas.
VERSION = "0.21.2"


def describe(adapter: Adapter, saved: list[str]) -> Fields:
    """Makes the fields of an ``adapter_config.json`` of LoRA.

    Args:
        adapter: what the config is of.
        saved: paths of the modules stored whole.

    Returns:
        The fields; one r and one alpha, and patterns for the modules that differ.
    """
    chosen = Chosen(LORA, adapter.updates, {}, adapter)
    return describe_chosen(chosen, homes_of(adapter.updates), saved)


def describe_chosen(chosen: Chosen, homes: Mapping[str, Home], saved: list[str]) -> Fields:
    """Makes the fields of an ``adapter_config.json`` of any type.

    Args:
        chosen: the adapter, and what it is written as.
        homes: where its updates are kept.
        saved: paths of the modules stored whole.

    Raises:
        AdapterError: one config cannot say what all layers need.
    """
    fields: Fields = {
        "peft_type": chosen.type.name,
        "peft_version": VERSION,
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
    }
    fields |= {"modules_to_save": saved or None} if chosen.type.name != "TRAINABLE_TOKENS" else {}
    fields |= _targets(chosen, homes)
    fields |= _bias(chosen, saved)
    fields |= _lora_fields(chosen) if chosen.type is LORA else {}
    if chosen.type.name in ("LORA", "LOHA", "LOKR"):
        fields |= ranks_of(chosen, homes)
    if chosen.tokens:
        fields["trainable_token_indices"] = {
            path: list(settings_of(update)["indices"]) for path, update in chosen.tokens.items()
        }
    return fields | options_of(chosen)


def is_base_weight(adapter: Adapter, name: str) -> bool:
    """Whether a replaced tensor is the weight of a layer that the adapter updates as well."""
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and module in adapter.updates


def _lora_fields(chosen: Chosen) -> Fields:
    low = list(chosen.low.values())
    return {
        "use_rslora": all(map(is_rslora, chosen.layers.values())),
        "use_dora": any(update.magnitude is not None for update in low),
        "lora_bias": any(update.bias is not None for update in low),
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "fan_in_fan_out": False,
    }


def _targets(chosen: Chosen, homes: Mapping[str, Home]) -> Fields:
    """The adapter's own rule where it says more than its paths do, else the paths."""
    rule, own = chosen.adapter.expects, chosen.type.targets
    parameters = [home.parameter for home in homes.values() if home.parameter is not None]
    fields: Fields = {"target_parameters": sorted(parameters)} if parameters else {}
    paths = [p for p in chosen.layers if homes[p].asked and homes[p].parameter is None]
    tables = [p for p in paths if not settings_of(chosen.layers[p]).get("head")]
    if chosen.type.name == "TRAINABLE_TOKENS" and tables:
        paths = tables  # PEFT wraps the heads that are tied to them, and fails on both names
    kept: Fields = {}
    if rule is not None and not rule.is_all_linear and all(map(rule.matches, paths)):
        kept = {
            "exclude_modules": rule.exclude_modules or None,
            "layers_to_transform": rule.layers_to_transform,
            "layers_pattern": rule.layers_pattern or None,
        }
    has_place = all(name in own for name, value in kept.items() if value is not None)
    if not kept or not has_place or chosen.type.name == "IA3":
        return {**fields, "target_modules": _exact_targets(sorted(paths))}
    assert rule is not None
    kept = {name: value for name, value in kept.items() if name in own}
    return {**fields, "target_modules": rule.target_modules, **kept}


def _exact_targets(paths: list[str]) -> str | list[str]:
    """The paths as a list, which most programs read, or as a regex where a list means too much.

    In a list ``fc`` means ``block.fc`` too, so a layer at the root asks for a regex, if it fits.
    """
    regex = "|".join(re.escape(path) for path in paths)
    at_root = any("." not in path for path in paths)
    return regex if at_root and len(regex) <= MAX_LENGTH else paths


def _bias(chosen: Chosen, saved: list[str]) -> Fields:
    """The narrowest mode that holds every lone bias."""
    adapter, modes = chosen.adapter, chosen.type.biases
    names = [name for name in adapter.replacements if not is_base_weight(adapter, name)]
    modules = [name.rpartition(".")[0] for name in names]
    alone = [m for m in modules if not saved_module(m, saved)]
    if alone and not modes:
        raise AdapterError(f"PEFT's {chosen.type.name} holds no biases: {shorten(alone)}")
    if not alone:
        return {"bias": "none"} if modes else {}
    return {"bias": modes[1] if all(module in chosen.layers for module in alone) else modes[2]}
