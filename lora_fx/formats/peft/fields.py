"""The fields of PEFT's configs: each checked for its type, all parsed and written again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lora_fx.adapters.safe_regex import compile_bounded
from lora_fx.errors import AdapterError, within

if TYPE_CHECKING:
    from lora_fx.formats.peft.config import PeftConfig

Check = Callable[[str, Any], Any]
Fields = dict[str, Any]
# Whose format it is: PEFT takes the files of OFT that do not say for those of older formulas.
VERSION = "0.21.2"
# Fields that say nothing about the result: who made the adapter, and from what. auto_mapping names
# a module: never imported.
NEUTRAL = frozenset(
    ["auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"]
)


def words(text: str) -> frozenset[str]:
    """A table's column of names."""
    return frozenset(text.split())


def checked(check: Check, default: Any = dataclasses.MISSING, needed: bool = False) -> Any:
    """A field whose value a function brings into its type, by name, if it is not null.

    Without a ``default``, of a dict the type, it has to be there; ``needed``, and not be null.
    """
    made: Any = {"metadata": {"check": check, "needed": needed}}
    made |= {"default_factory": dict} if default is dict else {"default": default}
    return dataclasses.field(**made)


def _of_type(entry: dataclasses.Field[Any], value: object) -> Any:
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


def pattern(check: Callable[[dict[str, Any]], Any]) -> Check:
    """What checks an object of one value for each module, by a function of the object."""
    return lambda name, value: check(_object(name, value))


def parse(
    fields: Mapping[str, object],
    origin: str,
    strict: bool,
    types: Mapping[str, type[PeftConfig]],
) -> PeftConfig:
    """Checks the fields of a config, wherever they were stored.

    A field that is missing or null has PEFT's default. ``strict`` refuses an adapter whose
    initialisation changed the base weights; without, it is warned of.
    """
    with within(origin):
        supported, name = ", ".join(types), fields.get("peft_type")
        if "peft_type" not in fields:
            raise AdapterError(f"peft_type is missing, expected {supported}")
        if not isinstance(name, str) or name not in types:
            raise AdapterError(f"peft_type is {name!r:.80}, supported: {supported}")
        made = types[name]
        _check_features(fields, made)
        config = made(**values_of(fields, made))
        config.check(fields, origin, strict)
        return config


def _check_features(fields: Mapping[str, object], made: type[PeftConfig]) -> None:
    """Refuses every feature that would change the result and is not supported."""
    known = {"peft_type", *NEUTRAL, *made.neutral, *(entry.name for entry in made.used())}
    for name in refused_in(fields, made):
        raise AdapterError(f"{name} is {fields[name]!r:.80}, a feature that is not supported")
    for name, value in fields.items():
        if value and name not in known | made.refused:
            raise AdapterError(
                f"{name} is {value!r:.80}, an unknown field that may change the result; "
                "remove it if it does not"
            )


def refused_in(fields: Mapping[str, object], made: type[PeftConfig]) -> list[str]:
    """The features of a type that a config has on, and that are not supported.

    An empty object is not "off": PEFT makes the default sub-config of one.
    """
    given = {name: fields.get(name) for name in sorted(made.refused)}
    return [n for n, v in given.items() if not (v is None or v is False or v == [])]


def values_of(fields: Mapping[str, object], made: type[PeftConfig]) -> Fields:
    """The fields that are used and there, each of its type."""
    values = {}
    for entry in made.used():
        name, value = entry.name, fields.get(entry.name)
        if value is not None or (name in fields and entry.metadata.get("needed")):
            values[name] = _of_type(entry, value)
        elif is_required(entry):
            raise AdapterError(f"{name} is missing; without it the scale is unknown")
    return values


def is_required(entry: dataclasses.Field[Any]) -> bool:
    """Whether a field has no default."""
    return entry.default is entry.default_factory is dataclasses.MISSING


def dump(config: PeftConfig) -> dict[str, object]:
    """The fields of an ``adapter_config.json``: those that are used, and who wrote it."""
    own = {entry.name: _plain(getattr(config, entry.name)) for entry in config.used()}
    return {
        "peft_type": config.peft_type,
        "peft_version": VERSION,
        "base_model_name_or_path": None,
        "inference_mode": True,
        **config.written,
        **own,
    }


def _plain(value: object) -> object:
    """A value as JSON has it; PEFT has null in place of an empty list."""
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value] or None
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return value
