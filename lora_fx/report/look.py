"""What an export tells of a graph beside its file: layers measured, drawn, and left as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from torch import fx

from lora_fx.errors import PassError
from lora_fx.explanation import unmerged
from lora_fx.report.around import Drawing, Surroundings
from lora_fx.report.layer_facts import LayerFacts, layer_facts
from lora_fx.report.stages import Stages


@dataclass(frozen=True)
class Picture:
    """A layer drawn as the model has it, with its adapter, and as it is in the file.

    Attributes:
        title: the kind of layer, of update and of form that it stands for.
        path: of the layer.
        stages: those that differ from the one before.
    """

    title: str
    path: str
    stages: list[Drawing] = field(repr=False)


@dataclass(frozen=True)
class Look:
    """What there is to see of a graph.

    Attributes:
        layers: what adapters do to each layer.
        pictures: one of each kind of layer, update and form.
        left: layers that are not merged -> why.
    """

    layers: list[LayerFacts] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def look(gm: fx.GraphModule, written: fx.GraphModule) -> Look:
    """Looks at a graph whose adapters are constants.

    Args:
        gm: the graph, in eval mode.
        written: what is made of it for a file.
    """
    stages = Stages.of(gm)
    layers = layer_facts(stages)
    graphs = {"the model": stages.base, "with its adapter": stages.whole, "in the file": written}
    shown = {title: Surroundings(graph) for title, graph in graphs.items()} if layers else {}
    return Look(layers, list(_pictures(shown, _kinds(layers))), unmerged(gm))


def look_at_slots(
    adapted: Iterable[fx.GraphModule],
    base: fx.GraphModule,
    written: fx.GraphModule,
    slots: Mapping[str, str],
) -> Look:
    """Looks at a graph that takes adapters.

    Args:
        adapted: graphs with one adapter each.
        base: the graph without any.
        written: what is made of it for a file.
        slots: path -> what kind of slot is there.
    """
    layers = [fact for gm in adapted for fact in layer_facts(Stages.of(gm), "input")]
    kinds = _kinds(layers) or {kind: path for path, kind in reversed(list(slots.items()))}
    graphs = {"the model": Surroundings(base), "in the file": Surroundings(written, open=True)}
    return Look(layers, list(_pictures(graphs, kinds)))


def _kinds(layers: Sequence[LayerFacts]) -> dict[str, str]:
    """One layer for each kind of layer, update and form: what it stands for -> its path."""
    found: dict[str, str] = {}
    for fact in layers:
        if fact.layer and fact.kind != "replaced":
            found.setdefault(f"{fact.layer} with {fact.kind}, {fact.form}", fact.path)
    return found


def _pictures(graphs: Mapping[str, Surroundings], kinds: Mapping[str, str]) -> Iterator[Picture]:
    for kind, path in kinds.items():
        if drawings := _drawings(graphs, path):
            yield Picture(kind, path, drawings)


def _drawings(graphs: Mapping[str, Surroundings], path: str) -> list[Drawing]:
    """A layer in each graph, where it looks otherwise than in the one before."""
    drawings: list[Drawing] = []
    for title, surroundings in graphs.items():
        with suppress(PassError):  # no graph need call it: a parameter, or a layer folded away
            drawing = surroundings.draw(path, title)
            if not drawings or str(drawing) != str(drawings[-1]):
                drawings.append(drawing)
    return drawings
