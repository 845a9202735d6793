"""Names of rows of a base's layers: q of a packed qkv, one of many experts; and of packs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

import torch

from lora_fx.layers.base_layers import BaseLayers
from lora_fx.layers.layer import Layer

# What one module holds, and the modules that others have instead, in the order of its rows.
PACKED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
# The parameter of many experts, and each expert's own layers, by the names of two families.
EXPERTS = {
    "gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")),
    "down_proj": (("down_proj", "w2"),),
}
_WORD = re.compile(r"(?:^|(?<=_))({})(?=_|$)")


@dataclass(frozen=True)
class Meaning:
    """Where the weight that a name is of has its rows.

    Attributes:
        layers: whose rows are those of the name, one below the other; mostly one, the layer itself.
            Or the parameter of many experts.
        before_end: of a part of one layer: 0 if it is the first, else so many times its own size
            its rows begin before the end. None where all of it is meant.
        expert: which of many.
        halves_swapped: whether the second half of the name's rows stands first in the layer.
        least: how many parts of the name's end another has to share to mean the same.
    """

    layers: tuple[str, ...]
    before_end: int | None = None
    expert: int | None = None
    halves_swapped: bool = False
    least: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether an update of the name is one of the layer, as it is."""
        return len(self.layers) == 1 and not self.halves_swapped and self.is_all

    @property
    def is_all(self) -> bool:
        """Whether all rows of the layers are meant."""
        return self.before_end is None and self.expert is None

    def shape(self, base: BaseLayers) -> tuple[int | None, ...]:
        """(out, in, *kernel) of the weight that the name is of; of a part, out is not known."""
        if self.expert is not None or self.layers[0] not in base:
            sizes = tuple(getattr(base.unevaluated(self.layers[0]), "shape", ()))
            sizes = sizes if self.expert is None else sizes[1:]
        else:
            each = [base[path].own_shape for path in self.layers]
            sizes = sum(shape[0] for shape in each), *each[0][1:]
        return sizes if self.before_end is None else (None, *sizes[1:])

    def layer(self, base: BaseLayers, out: int | None) -> Layer:
        """The layer that an update of the name acts on, as wide as its rows are together."""
        first = base.get(self.layers[0])
        if first is not None and self.is_whole:
            return first
        sizes = self.shape(base)
        shape = sizes[0] or out or 0, *(size or 0 for size in sizes[1:])
        if first is None:
            dtype = getattr(base.unevaluated(self.layers[0]), "dtype", torch.float32)
            return Layer(path=self.layers[0], kind="linear", shape=shape, dtype=dtype)
        return replace(first, shape=shape)

    def inside(self, start: str) -> Meaning:
        """The same of a child's layers, by the paths of who holds it."""
        return replace(self, layers=tuple(start + path for path in self.layers))

    def rows(self, base: BaseLayers, size: int) -> range:
        """The rows of the one layer that a part of this size has."""
        whole = self.rows_of_all(base)
        start = whole - size * self.before_end if self.before_end else 0
        return range(start, start + size)

    def rows_of_all(self, base: BaseLayers) -> int:
        """How many rows the layers have, or one expert."""
        size = Meaning(self.layers, expert=self.expert).shape(base)[0]
        return size or 0


Meanings = Mapping[str, Meaning]


def conventional(base: BaseLayers) -> dict[str, Meaning]:
    """The names that follow from those of a base: parts of what is packed, packs of what is apart.

    ``x.qkv_proj`` has the rows of ``x.q_proj``, ``x.k_proj`` and ``x.v_proj``, and the reverse;
    ``x.experts.gate_up_proj`` those of ``x.experts.0.gate_proj`` and so on.
    """
    return {**dict(_parts(base)), **_packs(base), **dict(_experts(base))}


def _parts(base: BaseLayers) -> Iterator[tuple[str, Meaning]]:
    for path in base:
        owner, dot, leaf = path.rpartition(".")
        for word, several in PACKED.items():
            if not _find(word).search(leaf):
                continue
            for place, part in enumerate(several):
                name = owner + dot + _find(word).sub(part, leaf)
                yield name, Meaning((path,), len(several) - place if place else 0)


def _packs(base: BaseLayers) -> dict[str, Meaning]:
    found: dict[str, dict[str, str]] = defaultdict(dict)
    parts = [(word, part) for word, several in PACKED.items() for part in several]
    for path, (word, part) in product(base, parts):
        owner, dot, leaf = path.rpartition(".")
        if _find(part).search(leaf):
            found[owner + dot + _find(part).sub(word, leaf)][part] = path
    return {
        name: Meaning(tuple(own[part] for part in several))
        for name, own in found.items()
        for several in PACKED.values()
        if set(several) == own.keys() and _stack(base, own.values())
    }


def _stack(base: BaseLayers, paths: object) -> bool:
    """Whether the layers read the same number of features."""
    layers = [base[path] for path in paths]  # type: ignore[attr-defined]
    return len({(layer.kind, layer.own_shape[1:]) for layer in layers}) == 1


def _experts(base: BaseLayers) -> Iterator[tuple[str, Meaning]]:
    for path, shape in base.all_parameters().items():
        owner, _, leaf = path.rpartition(".")
        if leaf not in EXPERTS or len(shape) != 3 or base.is_turned(owner):
            continue
        several = EXPERTS[leaf]
        for expert, (place, names) in product(range(shape[0]), enumerate(several)):
            part = None if len(several) == 1 else len(several) - place if place else 0
            for name in names:
                yield f"{owner}.{expert}.{name}", Meaning((path,), part, expert)


def _find(word: str) -> re.Pattern[str]:
    return re.compile(_WORD.pattern.format(word))
