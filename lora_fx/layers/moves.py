"""Prefix exchanges between a file's names and a base's paths, whose ends are the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lora_fx.graph.wrappers import PARTS

Words = tuple[str, ...]
# How far a name is moved: the whole of one path is the end of the other; words are added, left out
# or in another order; or others.
WRAPPED, MOVED, RENAMED = 0, 1, 2
# Parts of a path that wrappers add around any module, and that say nothing of where it is.
_SILENT = {"module", "default", "processor", *PARTS}


class Candidate(NamedTuple):
    """A path of the base that a name may mean.

    Attributes:
        path: in the base.
        old: what of the name stands before the common end, and after a common beginning.
        new: what the path has in that place.
        common: how many parts of the path the common end has.
        is_inside: whether there is a common beginning.
    """

    path: str
    old: Words
    new: Words
    common: int
    is_inside: bool

    @property
    def distance(self) -> int:
        """How far the name is moved."""
        old, new = (Counter(w for part in side for w in part.split("_")) for side in self[1:3])
        is_silent = _SILENT.issuperset((*self.old, *self.new))
        if is_silent or ((not old or not new) and not self.is_inside):
            return WRAPPED
        return MOVED if old <= new or new <= old else RENAMED


def candidate_of(before: Sequence[str], end: Sequence[str], path: str, dotted: bool) -> Candidate:
    """A path as what a name may mean.

    Args:
        before: the parts of the name before the common end.
        end: those of the end.
        path: of the base.
        dotted: whether the name's parts are those between dots; else they are words.
    """
    words = len(words_of(end))
    parts = path.split(".")
    common = next(n for n in range(1, len(parts) + 1) if len(words_of(parts[-n:])) == words)
    new = parts[:-common] if dotted else list(words_of(parts[:-common]))
    old = list(before)
    while old and new and old[0] == new[0]:
        del old[0], new[0]
    return Candidate(path, tuple(old), tuple(new), common, len(old) < len(before))


def words_of(parts: Iterable[str]) -> Words:
    """The words of the parts of a path, whatever stands between them."""
    return tuple(word for part in parts for word in part.split("_"))


def keeps_numbers(found: Candidate) -> bool:
    """Whether no layer becomes another's: what is moved has the same numbers."""
    old, new = ([part for part in side if part.isdigit()] for side in found[1:3])
    return old == new or (found.distance == WRAPPED and found.common > 1)
