"""The model behind a graph: traced again when another mode is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from lora_fx.errors import TraceError
from lora_fx.graph.alignment import Numbers, arguments, differing_numbers

_META = "lora_fx.source"
KEY = "lora_fx.traced"  # in the meta of each node: which node of the traced graph it is


@dataclass(frozen=True)
class Again:
    """A model in another mode.

    Attributes:
        graph: as it is traced there.
        modes: path -> training mode of each module: a model may keep some of them as they are.
        unsteady: why two calls may differ.
    """

    graph: fx.Graph
    modes: dict[str, bool]
    unsteady: str | None


@dataclass
class Source:
    """The model that a graph was traced from, for as long as the graph lives.

    Attributes:
        name: class of the model.
        graph: as it was traced.
        modes: path -> training mode of each module, as it was traced.
        again: traces the model once more, in the mode that is given.
        unsteady: the same of the mode that it was traced in.
    """

    name: str
    graph: fx.Graph
    modes: dict[str, bool]
    again: Callable[[bool], Again]
    unsteady: str | None
    _numbers: dict[bool, Numbers] = field(default_factory=dict)
    _others: dict[bool, Again] = field(default_factory=dict)

    def numbers(self, mode: bool) -> Numbers:
        """What the graph holds in a mode, where the modes differ: key -> place -> value.

        Raises:
            TraceError: the model cannot be traced in that mode, or takes another way there.
        """
        if mode not in self._numbers:
            self._numbers[mode] = self._found(mode)
        wanted: Numbers = {}
        nodes = {node.meta[KEY]: node for node in self.graph.nodes}
        for other, known in self._numbers.items():
            for key, places in known.items():
                given = arguments(nodes[key])
                held = {place: given[place] for place in places}
                wanted[key] = {**held, **wanted.get(key, {})}
                if other == mode:
                    wanted[key] |= places
        return wanted

    def unsteady_in_eval(self) -> str | None:
        """Why two calls of the model in eval mode may differ, or None."""
        return self._in(False).unsteady

    def modes_in(self, mode: bool) -> dict[str, bool]:
        """The mode of each module when the model is told to be in one."""
        return self._in(mode).modes

    def _in(self, mode: bool) -> Again:
        if mode not in self._others:
            as_it_is = set(self.modes.values()) <= {mode}
            traced = Again(self.graph, self.modes, self.unsteady)
            self._others[mode] = traced if as_it_is else self.again(mode)
        return self._others[mode]

    def _found(self, mode: bool) -> Numbers:
        other = self._in(mode)
        try:
            return differing_numbers(self.graph, other.graph, KEY)
        except TraceError as error:
            was, now = ("eval", "training") if mode else ("training", "eval")
            raise TraceError(
                f"{self.name} was traced in {was} mode and cannot be switched to {now} mode: "
                f"{error}\nTry: lora_fx.trace(model.{'train' if mode else 'eval'}(), ...), or "
                "set the mode of injected modules alone: "
                'gm.get_submodule("<path>.lora_dropout.<adapter>").train()'
            ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> Source:
        """Shared: it is never changed, and a copy would hold a second model."""
        return self

    def __reduce__(self) -> Any:
        """Not written: a file would hold the model."""
        return _nothing, ()


def _nothing() -> None:
    return None


def mark(gm: fx.GraphModule) -> None:
    """Marks the nodes of a fresh graph, so that copies of them are known again."""
    for number, node in enumerate(gm.graph.nodes):
        node.meta[KEY] = f"{number} {node.name}"


def remember(gm: fx.GraphModule, source: Source) -> None:
    """Tells a graph, and all that passes make of it, where it comes from."""
    gm.meta[_META] = source


def source_of(gm: fx.GraphModule) -> Source | None:
    """Where a graph comes from, if it is known."""
    source = gm.meta.get(_META)
    return source if isinstance(source, Source) else None
