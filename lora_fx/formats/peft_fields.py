"""Single fields of a PEFT config, each checked for its type."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from lora_fx.adapters.scaling import checked_alpha, checked_alphas, checked_rank, checked_ranks
from lora_fx.errors import AdapterError

T = TypeVar("T")
Fields = Mapping[str, object]


def field_of(fields: Fields, name: str, default: T) -> T:
    """A field, or the default where it is missing or null; refuses another type."""
    value = fields.get(name)
    if value is None:
        return default
    is_whole = isinstance(default, float) and type(value) is int
    if not isinstance(value, type(default)) and not is_whole:
        raise AdapterError(f"{name} is {value!r:.80}, expected a {type(default).__name__}")
    if isinstance(value, bool) and not isinstance(default, bool):
        raise AdapterError(f"{name} is {value!r}, expected a {type(default).__name__}")
    return value  # type: ignore[return-value]


def names_in(fields: Fields, name: str) -> list[str]:
    """A field that is a list of names, empty where it is missing."""
    names: list[str] = field_of(fields, name, [])
    if not all(isinstance(entry, str) and entry for entry in names):
        raise AdapterError(f"{name} is {names!r:.80}, expected a list of names")
    return names


def options_in(fields: Fields, record: type) -> Any:
    """A record of the fields that one type has alone, with PEFT's defaults for those missing."""
    values = {}
    for field in dataclasses.fields(record):
        is_list = field.default is dataclasses.MISSING
        default: Any = [] if is_list else field.default
        value = fields.get(field.name) if default is None else field_of(fields, field.name, default)
        if is_list:
            value = list(_indices(field.name, value))
        values[field.name] = value
    return record(**values)


def rank_in(fields: Fields, name: str, default: int) -> int:
    """The rank."""
    return checked_rank(name, fields.get(name, default))


def alpha_in(fields: Fields, name: str) -> float:
    """The alpha, which has to be there."""
    if name not in fields:
        raise AdapterError(f"{name} is missing; without it the scale is unknown")
    return checked_alpha(name, fields[name])


def patterns_in(fields: Fields) -> tuple[dict[str, int], dict[str, float]]:
    """Both patterns."""
    ranks: dict[str, Any] = field_of(fields, "rank_pattern", {})
    alphas: dict[str, Any] = field_of(fields, "alpha_pattern", {})
    return checked_ranks(ranks), checked_alphas(alphas)


def masks_in(fields: Fields) -> dict[str, list[bool]]:
    """AdaLoRA's rank_pattern: which of the init_r of a layer are left, by path."""
    masks: dict[str, Any] = field_of(fields, "rank_pattern", {})
    for key, mask in masks.items():
        is_mask = isinstance(mask, list) and all(type(entry) is bool for entry in mask)
        if not is_mask or not key.endswith(".lora_E"):
            raise AdapterError(
                f"rank_pattern[{key!r:.80}] is {mask!r:.80}, expected a list of true and false for "
                "<module>.lora_E"
            )
    return {key.removesuffix(".lora_E"): mask for key, mask in masks.items()}


def tokens_in(fields: Fields) -> dict[str, tuple[int, ...]] | tuple[int, ...] | None:
    """The trained tokens, of each table or of the only one."""
    name, value = "trainable_token_indices", fields.get("trainable_token_indices")
    if not value and (value is None or isinstance(value, list | dict)):
        return None
    if isinstance(value, dict):
        return {key: _indices(f"{name}[{key!r}]", tokens) for key, tokens in value.items()}
    return _indices(name, value)


def _indices(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(i) is not int or i < 0 for i in value):
        raise AdapterError(f"{name} is {value!r:.80}, expected a list of token ids")
    return tuple(value)
