"""What a graph knows of its past: what a folded layer was, and notes that follow its edits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import fx

FOLDED = "lora_fx.folded"


@dataclass(eq=False)
class Origin:
    """The graph before one fold.

    Attributes:
        gm: a private copy of it, tensors shared.
        generation: how many folds came before it.
        swept: names of the nodes that the fold removed.
    """

    gm: fx.GraphModule
    generation: int
    swept: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, gm: fx.GraphModule) -> Origin:
        """The origin of a fold of ``gm``."""
        earlier = [origin.generation for origin in origins(gm)]
        return cls(gm, max(earlier, default=0) + 1)


def origins(gm: fx.GraphModule) -> list[Origin]:
    """The origins of all folded nodes of a graph."""
    return [node.meta[FOLDED][0] for node in gm.graph.nodes if FOLDED in node.meta]


@runtime_checkable
class Note(Protocol):
    """What rides along in ``gm.meta`` and speaks of the graph's tensors."""

    def after(self, before: fx.GraphModule, now: fx.GraphModule) -> Note:
        """The same of a graph that a pass has edited.

        Args:
            before: the graph that the note was of.
            now: the graph that it is to be of, which may lack some of its tensors.
        """


def follow(before: fx.GraphModule, now: fx.GraphModule) -> None:
    """Brings the notes of a graph to what an edit has made of it."""
    for key, note in list(now.meta.items()):
        if isinstance(note, Note):
            now.meta[key] = note.after(before, now)
