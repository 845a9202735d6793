"""A model in several files, an encoder and a decoder: who gets what of an adapter, one report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx

from lora_fx.adapters.adapter import Adapter
from lora_fx.cli.model_source import ModelSource
from lora_fx.errors import AdapterError, shorten
from lora_fx.injection.bind import Binding, bind, targeted
from lora_fx.layers.base_layers import layers_in
from lora_fx.layers.sites import by_path

if TYPE_CHECKING:
    from lora_fx.export import ExportReport


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

    def save_json(self, path: Path) -> None:
        """Writes them as JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    def __str__(self) -> str:
        """One table after the other."""
        return "\n\n".join(map(str, self.reports))


def adapter_file(adapter: Adapter, part: ModelSource) -> str:
    """The name of an adapter's file; of a model in several files, with that of its part."""
    stem = "" if part.file == "model.onnx" else f".{Path(part.file).stem}"
    return f"{adapter.name}{stem}.onnx_adapter"


def shared_out(
    adapters: Sequence[Adapter], graphs: Sequence[fx.GraphModule]
) -> list[list[Adapter]]:
    """What each graph gets of each adapter: all of it where there is one graph alone.

    Raises:
        AdapterError: a part of an adapter is of no graph.
    """
    if len(graphs) == 1:
        return [list(adapters)]
    layers = [layers_in(gm, by_path(gm)) for gm in graphs]
    shares: list[list[Adapter]] = [[] for _ in graphs]
    for adapter in adapters:
        bindings = [bind(known, adapter) for known in layers]
        lost = set.intersection(*({*binding.refused} for binding in bindings))
        wanted = {p for known in layers for p in targeted(adapter.expects, known)}
        lost |= wanted - {path for binding in bindings for path in binding.updates}
        if lost:
            raise AdapterError(
                f"adapter {adapter.name}: {shorten(sorted(lost))} match nothing in any of the "
                f"{len(graphs)} files of the model, or are targeted and not in the adapter"
            )
        for share, binding in zip(shares, bindings, strict=True):
            if binding.updates or binding.replaced:
                share.append(_share(binding))
    return shares


def _share(binding: Binding) -> Adapter:
    adapter, refused = binding.adapter, binding.refused
    updates = {path: adapter.updates[path] for path in binding.meant}
    replaced = {n: t for n, t in adapter.replacements.items() if n not in refused}
    return replace(adapter, updates=updates, replacements=replaced, expects=None)
