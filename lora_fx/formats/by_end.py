"""Hints that are given for some layers, by the ends of their paths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from lora_fx.errors import AdapterError, shorten

T = TypeVar("T")


def value_for(values: Mapping[str, T], path: str) -> T | None:
    """The value of the longest name that is a path, or its end after a dot; None without one."""
    parts = path.split(".")
    ends = (".".join(parts[start:]) for start in range(len(parts)))
    return next((values[end] for end in ends if end in values), None)


def check_all_used(hint: str, values: Mapping[str, object], paths: Iterable[str]) -> None:
    """Refuses a name that no path is or ends in: a misspelt one would change the result.

    Raises:
        AdapterError: names them.
    """
    parts = [path.split(".") for path in paths]
    ends = {".".join(part[start:]) for part in parts for start in range(len(part))}
    unused = [name for name in values if name not in ends]
    if unused:
        raise AdapterError(f"{hint} names what is no layer of the file: {shorten(unused)}")
