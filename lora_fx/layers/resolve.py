"""What the names of a file mean in a base: found by the longest end that one layer alone has.

A file's paths begin with wrappers that the base has not, or lack those that it has, or name a part
of the model as it was called once. What stands before the end that both have in common is moved:
one move has to serve all names that it is of.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from lora_fx.errors import AdapterError, shorten
from lora_fx.layers.base_layers import BaseLayers
from lora_fx.layers.meanings import Meaning, Meanings, conventional
from lora_fx.layers.moves import (
    RENAMED,
    WRAPPED,
    Candidate,
    Words,
    candidate_of,
    keeps_numbers,
    words_of,
)

Size = tuple[int | None, ...]
# The words that kohya's names begin with.
_PARTS = {"lora", "lycoris", "unet", "transformer", "prior", "te", "te1", "te2", "te3"}


@dataclass(frozen=True)
class Resolved:
    """What names mean.

    Attributes:
        found: name -> path of the base, or of what stands for rows of it.
        moved: what was exchanged in paths, the old -> the new.
        several: name -> the paths of the base that it may mean.
    """

    found: dict[str, str] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    several: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Names:
    """The names that a base has, and those that mean parts of its layers, by their ends.

    Attributes:
        base: the layers.
        meanings: name -> what it means; of names that are the base's own, the layer.
        ends: the words of an end of a name -> the names.
    """

    base: BaseLayers
    meanings: Meanings
    ends: Mapping[Words, Sequence[str]]

    @classmethod
    def of(cls, base: BaseLayers, more: Meanings = {}) -> Names:  # noqa: B006
        """The names of a base; ``more`` are those of a format for it."""
        own = {name: Meaning((name,)) for name in (*base.all_parameters(), *base)}
        meanings = {**conventional(base), **more, **own}
        ends: dict[Words, list[str]] = defaultdict(list)
        for name in meanings:
            parts = name.split(".")
            for start in range(len(parts)):
                ends[words_of(parts[start:])].append(name)
        return cls(base, meanings, ends)

    def called(self, asked: Iterable[str]) -> BaseLayers:
        """The base's layers, by the names of a file too where each means one of them."""
        found = self.resolve(dict.fromkeys(asked, ())).found
        meant = {name: self.meanings[path] for name, path in found.items()}
        own = {n: m.layers[0] for n, m in meant.items() if m.is_whole and m.layers[0] in self.base}
        layers = {**self.base.layers, **{name: self.base[path] for name, path in own.items()}}
        return replace(self.base, layers=layers)

    def resolve(self, asked: Mapping[str, Size], furthest: int = RENAMED) -> Resolved:
        """Finds what each name means.

        Args:
            asked: name -> (out, in, *kernel) of the weight that it is of, as far as known.
            furthest: how far a name may be moved.
        """
        result = Resolved({name: name for name in asked if name in self.meanings})
        taken = set(result.found)
        every = {
            name: [c for c in self._candidates(name, size) if c.path not in taken]
            for name, size in asked.items()
            if name not in taken
        }
        known: set[tuple[Words, Words]] = set()
        for strict in (True, False):  # then what the moves found so far serve
            left = {n: found for n, found in every.items() if n not in result.found}
            usable = {n: _usable(found, furthest, strict, known) for n, found in left.items()}
            known |= _choose(usable, result)
        return result

    def _candidates(self, name: str, size: Size) -> list[Candidate]:
        """The paths that share the longest end with a name, of those that its size fits."""
        parts = name.split(".") if "." in name else name.split("_")
        unfit: list[Candidate] = []
        for start in range(len(parts)):
            before, end = parts[:start], parts[start:]
            paths = self.ends.get(words_of(end), ())
            every = [candidate_of(before, end, path, "." in name) for path in paths]
            # words tell no parts apart: vace_blocks_0_ffn_0 is not blocks.0.ffn.0
            cut = "." not in name and not _PARTS.issuperset(before)
            whole = [c for c in every if self.meanings[c.path].least <= (1 if cut else c.common)]
            found = [c for c in whole if keeps_numbers(c)]
            fitting = [c for c in found if self._fits(c.path, size)]
            if fitting:
                dotted = [c for c in fitting if c.path.split(".")[-c.common :] == end]
                return dotted if dotted and "." in name else fitting
            unfit = unfit or found
        return unfit

    def _fits(self, path: str, size: Size) -> bool:
        own = self.meanings[path].shape(self.base)
        same_out = None in (*size[:1], *own[:1]) or size[:1] in ((), own[:1])
        row, other = _length(size), _length(own)
        return same_out and (None in (row, other) or row == other or size[1:2] == own[1:2])


def _length(size: Size) -> int | None:
    """How many numbers a row has."""
    known = [n for n in size[1:] if n is not None]
    return prod(known) if size and len(known) == len(size) - 1 else None


def _usable(
    found: list[Candidate], furthest: int, strict: bool, known: set[tuple[Words, Words]]
) -> list[Candidate]:
    """Those of the smallest distance; a name's last part alone tells no other place."""
    own = [
        c
        for c in found
        if c.distance <= furthest
        and (c.distance == WRAPPED or c.common > 1 or (not strict and (c.old, c.new) in known))
    ]
    least = min((c.distance for c in own), default=0)
    return [c for c in own if c.distance == least]


def _choose(usable: Mapping[str, list[Candidate]], result: Resolved) -> set[tuple[Words, Words]]:
    """Notes what each name means, where one candidate is left: one that serves all of its group."""
    groups: dict[Words, list[str]] = defaultdict(list)
    for name, found in usable.items():
        for old in {c.old for c in found}:
            groups[old].append(name)
    moves = set()
    for old, names in groups.items():
        served = [{c.new for c in usable[n] if c.old == old} for n in names]
        common = set.intersection(*served)
        for name in names:
            found = [c for c in usable[name] if c.old == old]
            if len(found) > 1 and len(common) == 1:
                found = [c for c in found if c.new in common]
            if len(found) > 1:
                result.several[name] = [c.path for c in found]
                continue
            result.found[name] = found[0].path
            moves.add((old, found[0].new))
            if "." in name:
                result.moved[".".join(old)] = ".".join(found[0].new)
    return moves


def check_one(several: Mapping[str, list[str]]) -> None:
    """Refuses names that mean several layers.

    Raises:
        AdapterError: lists the layers of each.
    """
    if several:
        told = [f"{name} ({' or '.join(paths)})" for name, paths in several.items()]
        raise AdapterError(
            f"names that mean several layers of the base: {shorten(told)}; pass prefix= to "
            "load_adapter, the path of the module that the file is of, or rename one of the "
            "layers, or convert the file where it was made"
        )
