"""Where PEFT keeps each update in a file: inside of which wrappers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.formats.peft_places import WRAPPED


@dataclass(frozen=True)
class Home:
    """Where an update is kept.

    Attributes:
        key: the path in the file.
        asked: what the patterns name; "" where the layer has the rank of the one around it.
        parameter: the name in target_parameters, or None where target_modules names the module.
    """

    key: str
    asked: str
    parameter: str | None = None


def homes_of(layers: Mapping[str, AnyUpdate]) -> dict[str, Home]:
    """Finds where the updates are kept: the reverse of `places_of`."""
    nested: dict[str, list[str]] = {}
    for path, update in layers.items():
        if _parameter(update) is not None:
            nested.setdefault(_module(path, update), []).append(path)
    homes: dict[str, Home] = {}
    for module, paths in nested.items():
        for depth, path in enumerate(sorted(paths, key=lambda p: _depth(layers[p]))):
            name = f"{module}.{_parameter(layers[path])}"
            homes[path] = Home(module + WRAPPED * depth, name, name)
    for path in layers:
        owner, _, inner = path.rpartition(".")
        if path not in homes:
            is_inside = owner in layers and _parameter(layers[owner]) is None
            homes[path] = Home(f"{owner}{WRAPPED}.{inner}", "") if is_inside else Home(path, path)
    return homes


def _parameter(update: AnyUpdate) -> str | None:
    return None if update.stored is None else update.stored.settings.get("parameter")


def _depth(update: AnyUpdate) -> int:
    return 0 if update.stored is None else int(update.stored.settings["depth"])


def _module(path: str, update: AnyUpdate) -> str:
    return path.removesuffix(f".{_parameter(update)}")
