"""How formats spell the tensors of a layer: one table a format, read and written from it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from lora_fx.errors import AdapterError, shorten
from lora_fx.formats.layer_tensors import Layers, add

Tensors = Mapping[str, torch.Tensor]
# From the tensors that the table gives no use, and the layers, to the keys that have none at all.
Claim = Callable[[Tensors, Layers], list[str]]


@dataclass(frozen=True)
class Dialect:
    """The spelling of one format.

    Attributes:
        endings: end of a key -> role of the tensor; the first of a role is the one that is written.
        expected: what the message about a key of no known use ends with.
        prefix: regex of what stands before a path.
        older: end of a key -> what of it is the path's, by today's name, and today's ending.
        silent: a part of a path that says nothing.
        is_flat: a path has no dots.
        foreign: regex of a key -> the feature that it is of, known and not supported.
    """

    endings: Mapping[str, str]
    expected: str
    prefix: str = ""
    older: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    silent: str = ""
    is_flat: bool = False
    foreign: Mapping[str, str] = field(default_factory=dict)

    def split(self, key: str) -> tuple[str, str] | None:
        """The path and the role that a key means, by its longest known ending; None without one."""
        start = re.match(self.prefix, key)
        if start is None:
            return None
        rest = key[start.end() :]
        if self.silent:
            rest = f".{rest}".replace(f".{self.silent}.", ".")[1:]
        dots = [at for at, letter in enumerate(rest) if letter == "." and at]
        for dot in dots[:1] if self.is_flat else dots:
            path, ending = rest[:dot], rest[dot:]
            tail, ending = self.older.get(ending, ("", ending))
            if ending in self.endings:
                return path + tail, self.endings[ending]
        return None

    def key(self, path: str, role: str) -> str:
        """The key of a tensor of a layer, as this format writes it; the path has its prefix."""
        return path + self._written[role]

    def feature(self, key: str) -> str | None:
        """The feature that a key is of, where that is known and not supported."""
        if not re.match(self.prefix, key):
            return None
        return next((what for end, what in self.foreign.items() if re.search(end, key)), None)

    @cached_property
    def _written(self) -> dict[str, str]:
        return {role: ending for ending, role in reversed([*self.endings.items()])}


def _none(rest: Tensors, layers: Layers) -> list[str]:
    return list(rest)


def sort_keys(tensors: Tensors, dialect: Dialect, claim: Claim = _none) -> Layers:
    """Sorts every tensor of a file by layer and role.

    Args:
        tensors: by key.
        dialect: how they are spelled.
        claim: knows the uses of other keys, where a format has rules for them.

    Raises:
        AdapterError: a key without a use, or one of a feature that is not supported.
    """
    layers: Layers = {}
    rest: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        found = dialect.split(key)
        feature = dialect.feature(key) if found is None else None
        if feature is not None:
            raise AdapterError(f"tensor {key!r} is {feature}, which is not supported")
        if found is None:
            rest[key] = tensor
        else:
            add(layers, *found, key, tensor)
    unused = claim(rest, layers)
    if unused:
        raise AdapterError(
            f"{len(unused)} tensors have names of no known use: {shorten(unused)}; expected "
            f"{dialect.expected}"
        )
    return layers
