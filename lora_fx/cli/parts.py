"""A model in several files, an encoder and a decoder: who gets what of an adapter, one report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import fx

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.target_rule import ALL_LINEAR
from lora_fx.choices import Mode, SlotMode
from lora_fx.cli.components import of_components
from lora_fx.errors import AdapterError, shorten
from lora_fx.injection.bind import Binding, bind, targeted
from lora_fx.layers.base_layers import BaseLayers, layers_in
from lora_fx.layers.sites import by_path
from lora_fx.tasks.model_source import ModelSource

if TYPE_CHECKING:
    from lora_fx.export import ExportReport


class Report(Protocol):
    """What is said of an export: of one file, of several, or of one that was not made."""

    @property
    def verified(self) -> bool:
        """Whether every check agreed, and the controls did not."""

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""


@dataclass(frozen=True)
class Parts:
    """The reports of several files of one model."""

    reports: tuple[ExportReport, ...]

    @property
    def verified(self) -> bool:
        """Whether all are."""
        return all(report.verified for report in self.reports)

    def to_dict(self) -> dict[str, Any]:
        """The reports as plain values."""
        parts = [report.to_dict() for report in self.reports]
        return {"parts": parts, "task": self.reports[0].task, "verified": self.verified}

    def __str__(self) -> str:
        """One table after the other."""
        return "\n\n".join(map(str, self.reports))


# Modes in which adapters come with each run: what `to_onnx` calls them, and how their files end.
SWAPPING: dict[Mode, tuple[SlotMode, str]] = {
    "swappable": ("input", ".onnx_adapter"),
    "required": ("required", ".safetensors"),
}


def beside(mode: Mode, adapters: Sequence[Adapter]) -> list[Adapter | None]:
    """Whose files stand beside a model's; None: what is fed where there is no adapter."""
    if mode not in SWAPPING:
        return []
    return [*([None] if mode == "required" else []), *adapters]


def adapter_file(adapter: Adapter | None, part: ModelSource, mode: Mode) -> str:
    """The name of an adapter's file; of a model in several files, with that of its part."""
    name = "no-adapter" if adapter is None else adapter.name  # no adapter has a hyphen in its name
    label = f".{part.label}" if part.label else ""
    return f"{name}{label}{SWAPPING[mode][1]}"


class Work(NamedTuple):
    """What is to be written for one part.

    Attributes:
        part: of the model.
        graph: traced, without adapters.
        adapters: its share of them.
        mode: how it holds them.
        options: of `to_onnx`.
    """

    part: ModelSource
    graph: fx.GraphModule
    adapters: Sequence[Adapter]
    mode: Mode
    options: Mapping[str, Any]


def part_work(
    part: ModelSource,
    graph: fx.GraphModule,
    adapters: Sequence[Adapter],
    mode: Mode,
    slots: Sequence[str],
    vectors: bool,
    options: Mapping[str, Any],
) -> Work:
    """How a part is written: in a mode with slots, one without any as it is.

    Args:
        part: of the model.
        graph: traced, without adapters.
        adapters: its share of them.
        mode: how it holds them.
        slots: what was asked for: ``PATH`` or ``PATH=FORM``, in a pipeline behind the component.
        vectors: whether slots take vectors even if no adapter has any.
        options: of `to_onnx`, of every part.
    """
    if mode not in SWAPPING:
        return Work(part, graph, adapters, mode, options)
    start = f"{part.component}." if part.component else ""
    pairs = (text.partition("=") for text in slots)
    forms = {path: form or "factors" for path, _, form in pairs}
    own = {p.removeprefix(start): f for p, f in forms.items() if p.startswith(start)}
    own |= {ALL_LINEAR: "factors"} if ALL_LINEAR in forms else {}
    if part.component == "vae" or (slots and not own and not adapters):
        return Work(part, graph, adapters, "merged", options)
    own_options = {**options, "vectors": vectors or None, "slots": own}
    return Work(part, graph, adapters, mode, own_options)


def shared_out(
    by_component: Sequence[Mapping[str, Adapter]],
    parts: Sequence[ModelSource],
    graphs: Sequence[fx.GraphModule],
) -> list[list[Adapter]]:
    """What the graph of each part gets of each adapter: all of it where there is one part alone.

    Args:
        by_component: what each component gets, of each adapter.
        parts: of the model.
        graphs: of the parts.

    Raises:
        AdapterError: a part of an adapter is of no graph.
    """
    shares: list[list[Adapter]] = [[] for _ in parts]
    for component in dict.fromkeys(part.component for part in parts):
        own = [shares[component] for shares in by_component if component in shares]
        places = [place for place, part in enumerate(parts) if part.component == component]
        found = _among(own, [graphs[place] for place in places])
        for place, share in zip(places, found, strict=True):
            shares[place] = share
    return shares


def share_of(
    part: ModelSource,
    adapters: Sequence[Adapter],
    source: ModelSource,
    traced: Callable[[ModelSource], fx.GraphModule],
) -> tuple[fx.GraphModule, list[Adapter]]:
    """The graph of one part, and what it gets; others are traced only if it cannot take all.

    Raises:
        AdapterError: a part of an adapter is of no graph.
    """
    every = [of_components(adapter, source) for adapter in adapters]
    own = [shares[part.component] for shares in every if part.component in shares]
    beside = [p for p in (source, *source.more) if p.component == part.component]
    gm = traced(part)
    layers = layers_in(gm, by_path(gm))
    if len(beside) == 1 or not any(_lost([bind(layers, a)], a, [layers]) for a in own):
        return gm, own
    graphs = [gm if p is part else traced(p) for p in beside]
    return gm, _among(own, graphs)[beside.index(part)]


def _among(adapters: Sequence[Adapter], graphs: Sequence[fx.GraphModule]) -> list[list[Adapter]]:
    """The shares of graphs that are of one module."""
    if len(graphs) == 1:
        return [list(adapters)]
    layers = [layers_in(gm, by_path(gm)) for gm in graphs]
    shares: list[list[Adapter]] = [[] for _ in graphs]
    for adapter in adapters:
        bindings = [bind(known, adapter) for known in layers]
        lost = _lost(bindings, adapter, layers)
        if lost:
            raise AdapterError(
                f"adapter {adapter.name}: {shorten(sorted(lost))} match nothing in any of the "
                f"{len(graphs)} files of the model, or are targeted and not in the adapter: use "
                "the base that it was trained on, or save it again"
            )
        for share, binding in zip(shares, bindings, strict=True):
            if binding.updates or binding.replaced:
                share.append(_share(binding))
    return shares


def _lost(bindings: Sequence[Binding], adapter: Adapter, layers: Sequence[BaseLayers]) -> set[str]:
    """What of an adapter none of the graphs takes, and what it should have for them and lacks."""
    lost = set.intersection(*({*binding.refused} for binding in bindings))
    wanted = {p for known in layers for p in targeted(adapter.expects, known) or ()}
    return lost | (wanted - {path for binding in bindings for path in binding.updates})


def _share(binding: Binding) -> Adapter:
    adapter, refused = binding.adapter, binding.refused
    updates = {path: adapter.updates[path] for path in binding.meant}
    replaced = {n: t for n, t in adapter.replacements.items() if n not in refused}
    return replace(adapter, updates=updates, replacements=replaced, expects=None)
