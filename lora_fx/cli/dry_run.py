"""What an export would write, without writing it: all that is known before there is a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from lora_fx.adapters.describe import describe_update
from lora_fx.api import fold, inject
from lora_fx.choices import SlotForm
from lora_fx.cli.parts import SWAPPING, Work, adapter_file, beside
from lora_fx.errors import ExportError, shorten
from lora_fx.explanation import unmerged
from lora_fx.graph.example import DTYPE, TASK
from lora_fx.injection.bind import bind
from lora_fx.layers.base_layers import layers_in
from lora_fx.layers.sites import by_path

if TYPE_CHECKING:
    from lora_fx.export.program.export_unit import ExportUnit


@dataclass(frozen=True)
class PlannedFile:
    """One file that would be written.

    Attributes:
        file: its name.
        mode: how it would hold its adapters.
        task: what it would be exported for.
        dtype: what the model was cast to, if it was.
        inputs: their names.
        outputs: their names.
        adapters: name -> the layers that take it: ``path``, ``kind``, ``rank`` and more.
        adapter_files: what would be written of them beside it.
        slots: module paths that a later adapter could act on.
        notes: layers that would not be merged, where that is allowed.
    """

    file: str
    mode: str
    task: str | None
    dtype: str | None
    inputs: Sequence[str]
    outputs: Sequence[str]
    adapters: dict[str, list[dict[str, Any]]]
    adapter_files: Sequence[str]
    slots: Sequence[str]
    notes: Sequence[str]

    def lines(self) -> Iterator[str]:
        """As text."""
        words = [self.mode, *(f"task {task}" for task in (self.task,) if task)]
        words += [f"dtype {dtype}" for dtype in (self.dtype,) if dtype]
        yield f"{self.file}  {'  '.join(words)}"
        yield f"  inputs {', '.join(self.inputs)}"
        yield f"  outputs {', '.join(self.outputs)}"
        for name, layers in self.adapters.items():
            yield f"  adapter {name}: {len(layers)} layers"
            yield from (f"    {layer['path']}  {layer['kind']}" for layer in layers)
        if self.slots:
            yield f"  slots {len(self.slots)}: {shorten(list(self.slots))}"
        yield from (f"  note: {note}" for note in self.notes)


@dataclass(frozen=True)
class Plan:
    """What an export would write: all of it, or it would have been refused.

    Attributes:
        out: the directory.
        files: of models.
        names: all that would stand in the directory.
    """

    out: str
    files: tuple[PlannedFile, ...]
    names: tuple[str, ...]

    @property
    def verified(self) -> bool:
        """Nothing was written, so nothing was verified."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values."""
        parts = [asdict(file) for file in self.files]
        return {"dry_run": True, "out": self.out, "files": list(self.names), "parts": parts}

    def __str__(self) -> str:
        """What would be written, and which layers take which adapter."""
        head = f"dry run: nothing is written; would write to {self.out}: {', '.join(self.names)}"
        return "\n".join([head, *(line for file in self.files for line in file.lines())])


def planned(work: Work, allow_unmerged: bool) -> PlannedFile:
    """Binds and merges as an export does.

    Raises:
        LoraFxError: the export would be refused for the same reason.
    """
    part, gm, adapters, mode, _ = work
    layers = layers_in(gm, by_path(gm))
    taken = {
        adapter.name: [describe_update(p, u) for p, u in bind(layers, adapter).updates.items()]
        for adapter in adapters
    }
    unit = _unit(work)
    notes: list[str] = []
    slots: list[str] = []
    if mode in SWAPPING:
        slots = _slots(work)
    else:
        graph = inject(gm, adapters) if adapters else gm
        notes = not_merged(fold(graph), allow_unmerged) if mode == "merged" else []
    shown = "unmerged" if notes else mode
    return PlannedFile(
        part.file, shown, part.task.get(TASK), part.task.get(DTYPE),
        unit.inputs, unit.outputs, taken,
        [adapter_file(a, part, mode) for a in beside(mode, adapters)], slots, notes,
    )  # fmt: skip


def _unit(work: Work) -> ExportUnit:
    """What the base is called with and gives, by the names that were asked for."""
    from lora_fx.export.program.example_inputs import example_inputs
    from lora_fx.export.program.export_unit import export_unit
    from lora_fx.export.verification.eager import evaluating
    from lora_fx.export.verification.stateful_calls import refuse_unsteady

    gm, names = evaluating(work.graph), work.options.get("output_names")
    refuse_unsteady(gm)
    return export_unit(gm, example_inputs(gm, None, None, None, output_names=names))


def _slots(work: Work) -> list[str]:
    """The slots that there would be, which must serve the adapters."""
    from lora_fx.export.slots.choose import chosen_slots
    from lora_fx.export.slots.manifest import manifest_of
    from lora_fx.export.slots.slot_values import check_slots_serve

    slots = chosen_slots(work.graph, wanted_slots(work), work.options["vectors"])
    manifest = manifest_of(work.graph, slots)
    for adapter in work.adapters:
        inject(work.graph, adapter)
        check_slots_serve(adapter, manifest, Path(work.part.file), _Own(work.graph))
    return [slot.path for slot in slots]


@dataclass(frozen=True)
class _Own:
    """The base, of which there is no file yet."""

    graph: fx.GraphModule

    def holds(self, name: str, value: torch.Tensor) -> bool:
        """Whether a tensor is the base's own."""
        own = layers_in(self.graph, by_path(self.graph)).parameter(name)
        return own is not None and own.shape == value.shape and torch.equal(own, value)


def wanted_slots(work: Work) -> dict[str, SlotForm] | None:
    """What adapters change, and what was asked for."""
    from lora_fx.export import slots_for

    return {**slots_for(work.graph, work.adapters), **work.options["slots"]} or None


def not_merged(gm: fx.GraphModule, allowed: bool) -> list[str]:
    """What to note of layers that fold left with an adapter beside them; refused by default.

    Raises:
        ExportError: there are some, and that is not allowed.
    """
    left = unmerged(gm)
    if not left:
        return []
    lines = shorten([f"{path} ({reason})" for path, reason in left.items()])
    if allowed:
        return [f"not merged, computed beside the layer: {lines}"]
    raise ExportError(
        f"mode merged: fold left an adapter beside {len(left)} layers: {lines}; export with --mode "
        "unmerged, or with --allow-unmerged to merge the others alone"
    )
