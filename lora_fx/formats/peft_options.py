"""The fields that one of PEFT's types has alone, out of what its updates were read with."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.adapters.safe_regex import MAX_LENGTH
from lora_fx.errors import AdapterError, shorten
from lora_fx.formats.peft_chosen import Chosen
from lora_fx.formats.peft_vera import is_drawn_again

Fields = dict[str, Any]


def options_of(chosen: Chosen) -> Fields:
    """The fields of the type's record, which all updates have to agree on.

    Raises:
        AdapterError: they do not; names the field and the layers.
    """
    name = chosen.type.name
    if name == "IA3":
        return {"feedforward_modules": _feedforward(chosen)}
    if name == "TRAINABLE_TOKENS":
        return {"token_indices": list(_agreed(chosen, "indices", ()))}
    fields = {}
    for field in dataclasses.fields(chosen.type.options):
        fields[field.name] = _agreed(chosen, field.name, field.default)
    if name == "LOHA":
        cores = ["hada_t1" in tensors_of(update) for update in chosen.layers.values()]
        fields["use_effective_conv2d"] = fields["use_effective_conv2d"] or any(cores)
    if name == "VERA":
        fields["r"] = _agreed(chosen, "r", None)
        fields["save_projection"] = not is_drawn_again(chosen.layers)
    if name == "ADALORA":
        fields |= _adalora(chosen)
    return fields


def settings_of(update: AnyUpdate) -> Mapping[str, Any]:
    """What an update was read with."""
    return {} if update.stored is None else update.stored.settings


def tensors_of(update: AnyUpdate) -> Mapping[str, Any]:
    """What an update was read from."""
    return {} if update.stored is None else update.stored.tensors


def _agreed(chosen: Chosen, name: str, default: object) -> Any:
    values: dict[str, tuple[Any, list[str]]] = {}
    for path, update in chosen.layers.items():
        value = settings_of(update).get(name, default)
        values.setdefault(repr(value), (value, []))[1].append(path)
    if len(values) > 1:
        told = "; ".join(f"{text} at {shorten(paths, 3)}" for text, (_, paths) in values.items())
        raise AdapterError(f"PEFT has one {name} for all layers, but it is {told}")
    [(value, _)] = values.values()
    return value


def _adalora(chosen: Chosen) -> Fields:
    """PEFT refuses a config without steps to train; those here are never taken."""
    masks = {f"{p}.lora_E": settings_of(u).get("mask") for p, u in chosen.layers.items()}
    masks = {key: mask for key, mask in masks.items() if mask is not None}
    return {
        "init_r": int(_agreed(chosen, "ranknum", None)),
        "lora_alpha": _agreed(chosen, "alpha", None),
        "rank_pattern": masks or None,
        "total_step": 1,
        "tinit": 0,
        "tfinal": 0,
    }


def _feedforward(chosen: Chosen) -> str | list[str]:
    """The layers that are scaled at their input: PEFT compares ends of paths, or a regex."""
    every = sorted(chosen.layers)
    inner = [path for path in every if settings_of(chosen.layers[path])["feedforward"]]
    regex = "|".join(re.escape(path) for path in inner)
    if inner and len(regex) <= MAX_LENGTH:
        return regex
    extra = [path for path in every if path.endswith(tuple(inner)) and path not in inner]
    if inner and extra:
        raise AdapterError(
            f"PEFT's feedforward_modules would mean {shorten(extra)} too, which is "
            "scaled at its output"
        )
    return inner
