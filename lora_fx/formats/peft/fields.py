"""Single fields of a PEFT config, each checked for its type."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from lora_fx.adapters.safe_regex import compile_bounded
from lora_fx.adapters.scaling import checked_alphas, checked_ranks
from lora_fx.errors import AdapterError

Check = Callable[[str, Any], Any]


def checked(check: Check, default: Any = dataclasses.MISSING, needed: bool = False) -> Any:
    """A field that a function checks, by its name, and brings into its type.

    Args:
        check: takes the name and the value, which is not null.
        default: PEFT's; none for a field that has to be there. Of a dict, the type.
        needed: null is no value of it either, but is refused.
    """
    made: Any = {"metadata": {"check": check, "needed": needed}}
    made |= {"default_factory": dict} if default is dict else {"default": default}
    return dataclasses.field(**made)


def is_needed(entry: dataclasses.Field[Any]) -> bool:
    """Whether null is refused, and does not stand for the default."""
    return bool(entry.metadata.get("needed"))


def of_type(entry: dataclasses.Field[Any], value: object) -> Any:
    """The value of a field; refuses another type than that of the default, if there is one."""
    if "check" in entry.metadata:
        return entry.metadata["check"](entry.name, value)
    return value if entry.default is None else _like(entry.name, value, entry.default)


def _like(name: str, value: object, default: object) -> object:
    is_whole = isinstance(default, float) and type(value) is int
    is_bool = isinstance(value, bool) and not isinstance(default, bool)
    if (not isinstance(value, type(default)) and not is_whole) or is_bool:
        raise AdapterError(f"{name} is {value!r:.80}, expected a {type(default).__name__}")
    return value


def anything(name: str, value: object) -> object:
    """What the record checks itself."""
    return value


def names(name: str, value: object) -> tuple[str, ...]:
    """A list of names."""
    if not isinstance(value, list) or not all(isinstance(n, str) and n for n in value):
        raise AdapterError(f"{name} is {value!r:.80}, expected a list of names")
    return tuple(value)


def names_or_regex(name: str, value: object) -> str | tuple[str, ...]:
    """A list of names, or a bounded regex."""
    if not isinstance(value, str):
        return names(name, value)
    return compile_bounded(value, name).pattern


def ranks(name: str, value: object) -> dict[str, int]:
    """A rank_pattern."""
    return checked_ranks(_object(name, value))


def alphas(name: str, value: object) -> dict[str, float]:
    """An alpha_pattern."""
    return checked_alphas(_object(name, value))


def masks(name: str, value: object) -> dict[str, list[bool]]:
    """AdaLoRA's rank_pattern: which of the init_r of a layer are left, by ``<path>.lora_E``."""
    found = _object(name, value)
    for key, mask in found.items():
        is_mask = isinstance(mask, list) and all(type(entry) is bool for entry in mask)
        if not is_mask or not key.endswith(".lora_E"):
            raise AdapterError(
                f"{name}[{key!r:.80}] is {mask!r:.80}, expected a list of true and false for "
                "<module>.lora_E"
            )
    return found


def tokens(name: str, value: object) -> dict[str, tuple[int, ...]] | tuple[int, ...] | None:
    """The trained tokens, of each table or of the only one; None if there are none."""
    if isinstance(value, dict):
        return {key: indices(f"{name}[{key!r}]", own) for key, own in value.items()} or None
    return indices(name, value) or None


def indices(name: str, value: object) -> tuple[int, ...]:
    """A list of tokens."""
    if not isinstance(value, list) or any(type(i) is not int or i < 0 for i in value):
        raise AdapterError(f"{name} is {value!r:.80}, expected a list of token ids")
    return tuple(value)


def _object(name: str, value: object) -> dict[str, Any]:
    found: dict[str, Any] = _like(name, value, {})  # type: ignore[assignment]
    return found
