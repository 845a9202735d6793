"""What a folded layer was, kept so that it can be given back exactly."""

from __future__ import annotations

from dataclasses import dataclass, field

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
