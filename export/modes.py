"""The modes of an export, constant and swappable: what is exported, and held against what."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir
from torch import fx

from lora_fx.errors import AdapterError
from lora_fx.export.program.export_unit import ExportUnit
from lora_fx.export.quantization.numbers import packed_in, weight_of, with_numbers
from lora_fx.export.quantization.pack_file import NOT_QUANTISED
from lora_fx.export.report import Reference, Verification
from lora_fx.export.rewriting.file_layers import FileLayer
from lora_fx.export.slots.adapter_file import ORT_ADAPTER, SAFETENSORS, export_adapter
from lora_fx.export.slots.choose import Wanted, chosen_slots
from lora_fx.export.slots.insert import OwnTensors, open_slots, set_defaults, shared
from lora_fx.export.slots.manifest import KEY, manifest_of
from lora_fx.export.slots.probe import TRIED_RANKS, probe
from lora_fx.export.slots.slot import AnySlot, TensorSlot
from lora_fx.export.verification.eager import evaluating
from lora_fx.export.verification.negative_controls import (
    FACTOR,
    NO_ADAPTER,
    controls,
    with_a_weight_scaled,
)
from lora_fx.export.verification.references import reference, swapped
from lora_fx.export.verification.verify import verify_file
from lora_fx.injection.bind import bind
from lora_fx.injection.branches import free_name
from lora_fx.io.atomic import scratch
from lora_fx.layers.base_layers import layers_in
from lora_fx.layers.sites import by_path
from lora_fx.passes import ChooseForm, InjectLora, RaiseLora, StripLora
from lora_fx.report.look import Look, look, look_at_slots

_TRACED_RANK = (3,)


@dataclass(frozen=True)
class Constant:
    """Every weight is a constant of the file.

    Attributes:
        source: the graph as it was given.
        expected: the same in eval mode, which the file must agree with.
        traced: the same with each low-rank product in its cheapest form, which is exported.
        slots: none.
    """

    source: fx.GraphModule
    expected: fx.GraphModule
    traced: fx.GraphModule
    slots: tuple[AnySlot, ...] = ()

    @classmethod
    def of(cls, gm: fx.GraphModule, *, apart: bool = False) -> Constant:
        """Plans the export of a graph: what it computes, not how it was spelled.

        Args:
            gm: the graph.
            apart: keep branches apart from the weights of their layers, in no other form.
        """
        expected = evaluating(gm)
        raised = RaiseLora(free_name(expected))(expected).graph_module
        return cls(gm, expected, evaluating(raised if apart else ChooseForm()(raised).graph_module))

    @property
    def notes(self) -> list[str]:
        """Nothing to say."""
        return []

    def open(self, model: ir.Model) -> None:
        """Changes nothing: there are no slots."""

    def close(self, model: ir.Model) -> None:
        """Changes nothing."""

    def look(self) -> Look:
        """What there is to see of the graph."""
        return look(self.expected, self.traced)

    def verify(self, path: Path, trial: ExportUnit) -> Verification:
        """The file against the graph."""
        return verify_file(path, trial, [reference("model", self.source)], controls(self.source))

    def verify_numbers(self, path: Path, trial: ExportUnit) -> Verification:
        """The file against the graph with the numbers that the file stores in a few bits."""
        packed = packed_in(path)
        numbers, _ = with_numbers(self.traced, packed)
        others = _plain(self.traced, numbers, packed)
        return verify_file(path, trial, [_held("model", numbers)], others)


@dataclass(frozen=True)
class Swappable:
    """Low-rank weights are inputs of the file, which alone is the base.

    Attributes:
        source: the graph as it was given.
        base: the graph without adapters.
        traced: the base with a probe in each slot, which is exported.
        slots: where an adapter can act.
        required: whether they have no default.
    """

    source: fx.GraphModule
    base: fx.GraphModule
    traced: fx.GraphModule
    slots: tuple[AnySlot, ...]
    required: bool = False

    @classmethod
    def of(
        cls,
        gm: fx.GraphModule,
        wanted: Wanted,
        vectors: bool | None = None,
        *,
        required: bool = False,
        apart: bool = False,
    ) -> Swappable:
        """Plans the export of a graph with its adapters taken out and slots in their place."""
        slots = tuple(chosen_slots(gm, wanted, vectors))
        base = StripLora()(gm).graph_module
        own = OwnTensors(shared(base, slots))(base).graph_module
        probed = InjectLora(probe(slots, _TRACED_RANK))(own).graph_module
        traced = probed if apart else ChooseForm(target="input")(probed).graph_module
        return cls(gm, evaluating(base), evaluating(traced), slots, required)

    @property
    def notes(self) -> list[str]:
        """What whole tensors cost."""
        whole = [slot for slot in self.slots if isinstance(slot, TensorSlot)]
        size = sum(math.prod(slot.shape) * slot.torch_dtype.itemsize for slot in whole)
        if not whole:
            return []
        return [f"{len(whole)} whole tensors can be replaced: {size / 1e6:.2f} MB by each adapter"]

    def open(self, model: ir.Model) -> None:
        """Makes the probe's weights inputs, before anything can merge or evaluate them."""
        open_slots(model, self.traced, self.slots)

    def close(self, model: ir.Model) -> None:
        """Adds the defaults and the manifest."""
        set_defaults(model, self.slots, self.required)
        manifest = manifest_of(self.base, self.slots, self.required)
        model.metadata_props[KEY] = manifest.to_json()

    def look(self) -> Look:
        """What there is to see of the graph, and of each adapter in it."""
        kinds = {slot.path: f"{slot.kind}, a slot" for slot in self.slots}
        adapted = (evaluating(alone) for _, alone in swapped(self.source))
        return look_at_slots(adapted, self.base, self.traced, kinds)

    def verify(self, path: Path, trial: ExportUnit) -> Verification:
        """The file alone against the base; with the adapters of the graph, and one of other ranks.

        The graph's own are tried at the traced shape alone: what shapes can do is the file's. A
        file that has to be fed is fed from safetensors, as its users do; alone, from that of none.
        """
        adapter = probe(self.slots, TRIED_RANKS, 1, self.base)
        base = replace(reference("base", self.base), coverage=None)
        control = replace(base, what=NO_ADAPTER, notes=())
        ending = SAFETENSORS if self.required else ORT_ADAPTER
        with scratch() as directory:
            subjects, notes = [base], []
            if self.required:
                none = directory / f"none{ending}"
                export_adapter(None, path, none, check=False)
                subjects = [replace(base, adapter=none)]
            for place, (own, alone) in enumerate(swapped(self.source)):
                file = directory / f"{place}{ending}"
                try:
                    renamed = bind(layers_in(alone, by_path(alone)), own).renamed()
                    export_adapter(renamed, path, file, check=False)
                except AdapterError as error:
                    notes.append(f"not tried: {error}")
                    continue
                subjects.append(reference(own.name, alone, file, once=True))
            file = directory / f"probe{ending}"
            export_adapter(adapter, path, file, check=False)  # it was just written
            probed = reference("adapted", InjectLora(adapter)(self.base).graph_module, file)
            # Its tokens are compared where there are no adapters of the user's to do it with.
            subjects.append(replace(probed, coverage=None, generates=len(subjects) == 1))
            evidence = verify_file(path, trial, subjects, [control])
        evidence.notes += notes
        return evidence

    def verify_numbers(self, path: Path, trial: ExportUnit) -> Verification:
        """The file against the base with the numbers that it stores in a few bits, as `verify`."""
        adapter, packed = probe(self.slots, TRIED_RANKS, 1, self.base), packed_in(path)
        numbers, _ = with_numbers(self.base, packed)
        adapted = InjectLora(adapter)(numbers).graph_module
        plain = adapted if numbers is self.base else InjectLora(adapter)(self.base).graph_module
        with scratch() as directory:
            file = directory / "probe.onnx_adapter"
            export_adapter(adapter, path, file, check=False)
            subjects = [_held("base", numbers), replace(_held("adapted", adapted), adapter=file)]
            return verify_file(path, trial, subjects, _plain(plain, adapted, packed))


def _held(what: str, gm: fx.GraphModule) -> Reference:
    return Reference(f"{what}, dequantised", evaluating(gm))


def _plain(
    gm: fx.GraphModule, numbers: fx.GraphModule, packed: Mapping[str, FileLayer]
) -> Iterator[Reference]:
    """What a file of few bits must not agree with: plain weights, if they are others."""
    if gm is not numbers:
        yield Reference(NOT_QUANTISED, evaluating(gm))
    weights = list(map(weight_of, packed.values()))
    for name, changed in with_a_weight_scaled(numbers, weights):
        yield Reference(f"control: {name} x {FACTOR}", changed)
