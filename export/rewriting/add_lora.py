"""Slots for adapters in an ONNX file that has none, whoever made it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common

from lora_fx.adapters.adapter import Adapter, Update
from lora_fx.adapters.target_rule import ALL_LINEAR
from lora_fx.choices import SlotMode, check_choice, takes
from lora_fx.errors import ExportError, shorten, within
from lora_fx.export.onnx_model.changed_file import check_digests, tensor_digests
from lora_fx.export.onnx_model.external_data import check_external_data
from lora_fx.export.onnx_model.model_file import INLINE_LIMIT, load_proto, manifest_in, write_model
from lora_fx.export.onnx_model.parsed import parsed_file
from lora_fx.export.quantization.heads import BRANCH
from lora_fx.export.quantization.numbers import of_whole_x
from lora_fx.export.report import Clock, ExportReport, Verification, file_sizes
from lora_fx.export.rewriting.changed_base import Opened, put_in_weights
from lora_fx.export.rewriting.dequantize import is_known
from lora_fx.export.rewriting.file_layers import FileLayer, layers_in, types_of_numbers
from lora_fx.export.rewriting.insert_slots import insert_slot, slot_of
from lora_fx.export.rewriting.layer_names import Paths, check_one, is_fused, named_layers
from lora_fx.export.rewriting.missed_calls import missed_calls
from lora_fx.export.rewriting.unopened import clipped, unopened
from lora_fx.export.runtime.ort import unreadable
from lora_fx.export.slots.adapter_file import export_adapter
from lora_fx.export.slots.check_adapter import read_stored, values_of
from lora_fx.export.slots.insert import set_defaults
from lora_fx.export.slots.manifest import KEY, Manifest
from lora_fx.export.slots.probe import TRIED_RANKS, probe
from lora_fx.export.slots.slot import Slot
from lora_fx.export.verification.file_run import Run
from lora_fx.export.verification.made_inputs import feeds_for
from lora_fx.export.verification.negative_controls import NO_ADAPTER
from lora_fx.export.verification.side_by_side import Pair, coarsest_named, held_against
from lora_fx.io.atomic import refuse_existing, scratch, staged
from lora_fx.io.output_place import keeping

_MOST = 1 << 30  # bytes of dequantised weights that a verification makes


@takes(ExportError, unreadable)
def add_lora(
    model_path: str | Path,
    out_path: str | Path,
    *,
    slots: str | Sequence[str] = ALL_LINEAR,
    names: Mapping[str, str] | None = None,
    adapters: SlotMode = "input",
    inputs: Mapping[str, Any] | None = None,
    check: bool = True,
    verify: bool = True,
    external_data_above: int = INLINE_LIMIT,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ExportReport:
    """Writes an ONNX file with slots, for `export_adapter`, `Session` and `merge_onnx`.

    A layer is a MatMul, Gemm or MatMulNBits, a Conv, or a Gather, with a stored weight, which may
    be quantised. It is called after the module path in the name of its weight
    (``encoder.fc.weight``), or in that of its node (``/encoder/fc/MatMul``).

    Args:
        model_path: the file.
        out_path: the ``.onnx`` file to write.
        slots: paths of layers, where ``*`` stands for any part of one; or ``"all-linear"``.
        names: what layers are called: name of a weight or a node of the file -> module path.
        adapters: ``"input"``, or ``"required"``: slots without a default, as in `to_onnx`.
        inputs: by name, to compare the files on; made by what the file says of them if None.
        check: read all weights of a file of ours once, and refuse one that was changed.
        verify: run both files in onnxruntime, and the new one with a random adapter beside one
            with that in its weights.
        external_data_above: bytes of weights from which they go to ``<path>.data``.
        force: replace files that exist.
        progress: told the name of each stage as it starts.

    Raises:
        ExportError: no layer of a name, two of one, the file has slots, or the output exists.
        VerificationError: the files disagree, or the control agrees.
    """
    check_choice("adapters=", adapters, SlotMode, ExportError)
    path, out, clock = Path(model_path), Path(out_path), Clock(progress)
    with keeping(path):
        refuse_existing(out, force=force)
    proto = load_proto(path)
    if manifest_in(proto, path) is not None:
        raise ExportError(f"{path}: has slots already: export an adapter for it as it is")
    check_external_data(proto, path)
    if check:
        with clock.stage("check"):
            check_digests(proto, path)
    with clock.stage("slots"):
        model = parsed_file(path)
        with within(path):
            manifest, opened, notes = _open(model, slots, names or {}, adapters == "required")
    with staged(out, force=force) as draft:
        with clock.stage("write"):
            known = tensor_digests(proto, path)
            write_model(model, draft, external_data_above=external_data_above, known=known)
        evidence = Verification.left_out()
        if verify:
            with clock.stage("verify"):
                base = Run(path)
                feeds = feeds_for(base, proto, inputs)
                with of_whole_x(path) as exact, of_whole_x(draft) as made:
                    base = base if exact == path else Run(exact)
                    evidence = _evidence(made, base, manifest, opened, feeds)
                evidence.judge(str(out))
        files = file_sizes(draft.parent)
    return ExportReport.of(
        out,
        evidence,
        clock,
        mode="required" if manifest.required else "swappable",
        files=files,
        opset=model.opset_imports[""],
        notes=notes,
        inputs=[n for v in model.graph.inputs if (n := str(v.name)) not in manifest.names],
        outputs=[str(value.name) for value in model.graph.outputs],
        slots=[slot.path for slot in manifest.slots],
    )


def _open(
    model: ir.Model, slots: str | Sequence[str], names: Mapping[str, str], required: bool
) -> tuple[Manifest, Opened, list[str]]:
    """Puts slots into a model, in place; says which layers have no name."""
    every = list(layers_in(model))
    if held := [n for layer in every if BRANCH in (n := str(layer.weight.name))]:
        raise ExportError(
            f"an adapter stands beside its layers already ({shorten(held)}): export the model "
            "without it, or swappable"
        )
    layers, nameless = named_layers(every, names)
    nodes = {layer.node for layer in every}
    chosen = _chosen(layers, nameless, slots, lambda: unopened(model, nodes))
    notes = [note for note in (unopened(model, nodes, linear=True), clipped(chosen)) if note]
    _refuse_fused(chosen, names)
    _refuse_missed(every, chosen, names)
    for value in [v for v in model.graph.inputs if v.is_initializer()]:
        model.graph.inputs.remove(value)  # a constant, where nobody overrides it
    found = [slot_of(path, calls[0]) for path, calls in chosen.items()]
    manifest = Manifest(tuple(found), required)
    _refuse_taken(model, manifest.names)
    for slot, calls in zip(found, chosen.values(), strict=True):
        insert_slot(model, slot, calls)
    set_defaults(model, manifest.slots, required)
    model.metadata_props[KEY] = manifest.to_json()
    common.NameFixPass()(model)  # the file may have values that are called as what was put in
    said = f"no slot for what has no name: {shorten(nameless)}: names= gives one"
    place = {layer.node: number for number, layer in enumerate(every)}
    opened = {path: {place[c.node]: c for c in calls} for path, calls in chosen.items()}
    return manifest, opened, [said, *notes] if nameless else notes


def _chosen(
    layers: Paths, nameless: Sequence[str], slots: str | Sequence[str], others: Callable[[], str]
) -> Paths:
    given = [slots] if isinstance(slots, str) else slots
    if not isinstance(given, Collection) or not all(isinstance(name, str) for name in given):
        raise ExportError(f"slots: {slots!r:.80} is no name or list of names of layers")
    if not given:
        raise ExportError(f"slots: names no layer; there are {shorten(list(layers)) or 'none'}")
    linear = [path for path, calls in layers.items() if any(c.kind == "linear" for c in calls)]
    found: dict[str, None] = {}
    unknown = []
    for name in given:
        paths = linear if name == ALL_LINEAR else [p for p in layers if fnmatchcase(p, name)]
        found |= dict.fromkeys([name] if name in layers else paths)
        unknown += [] if paths or name in layers else [name]
    if unknown:
        without = (
            f"; without a name: {shorten(list(nameless))}: names= gives one" if nameless else ""
        )
        without += f"; {said}" if (said := others()) else ""
        raise ExportError(
            f"slots: no layer at {shorten(unknown)}; there are {shorten(list(layers)) or 'none'}"
            f"{without}"
        )
    chosen = {path: calls for path, calls in layers.items() if path in found}
    for path, calls in chosen.items():
        check_one(path, calls)
    return chosen


def _refuse_fused(chosen: Paths, names: Mapping[str, str]) -> None:
    """An adapter is trained beside the layer's own weight: what was fused follows both."""
    given = set(names.values())
    found = [
        f"{path} (weight {next(c.weight.name for c in calls if is_fused(c))})"
        for path, calls in chosen.items()
        if path not in given and any(map(is_fused, calls))
    ]
    if found:
        raise ExportError(
            f"{shorten(found)}: not the module's own weight: by its name a batch-norm was fused "
            "into it, and what an adapter adds would miss that: export the model so that it stays, "
            "which torch.onnx does where it is told not to optimise, and TorchScript's exporter "
            "not to fold constants; or name it in names= to take the weight as it is"
        )


def _refuse_missed(every: Sequence[FileLayer], chosen: Paths, names: Mapping[str, str]) -> None:
    """An adapter of a layer is one of all its calls."""
    given = set(names.values())
    asked = {path: calls for path, calls in chosen.items() if path not in given}
    if found := [f"{path} (by {node})" for path, node in missed_calls(every, asked).items()]:
        raise ExportError(
            f"{shorten(found)}: called once more where no slot can stand: what an adapter adds "
            "would miss that: export the model without fusing or nesting that call, choose other "
            "layers in slots=, or name it in names= to open the other calls alone"
        )


def _refuse_taken(model: ir.Model, names: Sequence[str]) -> None:
    taken = {value.name for value in model.graph.initializers.values()}
    taken |= {value.name for value in model.graph.inputs}
    taken |= {value.name for node in model.graph.all_nodes() for value in node.outputs}
    if both := [name for name in names if name in taken]:
        raise ExportError(f"it has values called {shorten(both)} already: names= gives other paths")


def _evidence(
    draft: Path, base: Run, manifest: Manifest, opened: Opened, feeds: Any
) -> Verification:
    """The new file alone against the old one; with an adapter against the old one with W'."""
    known = _told(manifest, opened)
    tried = [slot for slot in manifest.slots if known[slot.path]]
    left = [slot.path for slot in manifest.slots if not known[slot.path]]
    probed = tried or manifest.slots
    updates: Any = dict(probe(probed, TRIED_RANKS).updates)
    for slot in probed:
        if isinstance(slot, Slot) and slot.groups > 1:
            updates[slot.path] = _apart(updates[slot.path], slot)
    with scratch() as directory:
        file, changed = directory / "probe.onnx_adapter", directory / "changed.onnx"
        export_adapter(Adapter("probe", updates), draft, file, check=False)
        stored = read_stored(file)
        model = parsed_file(base.path)
        dtype = coarsest_named([*types_of_numbers(model), *(slot.dtype for slot in manifest.slots)])
        put_in_weights(model, tried, opened, values_of(stored))
        write_model(model, changed, external_data_above=INLINE_LIMIT)
        bare, adapted = Run(draft, None, manifest), Run(draft, file, manifest)
        pairs, control = [Pair("base", bare, base)], {"control: an adapter": adapted}
        if tried:
            pairs.append(Pair("adapted", adapted, Run(changed)))
            control = {NO_ADAPTER: bare}
        evidence = held_against(pairs, control, feeds, dtype)
    if left:
        evidence.notes.append(f"tried without an adapter alone: {shorten(left)}")
    return evidence


def _apart(update: Update, slot: Slot) -> Update:
    """The update, each rank of which reads and gives one group alone: what a weight can hold."""
    up, down = update.up.clone(), update.down.clone()
    outs, ins = (torch.arange(n) * slot.groups // n for n in (len(up), down.shape[1]))
    for rank in range(update.rank):
        up[outs != rank % slot.groups, rank] = 0
        down[rank, ins != rank % slot.groups] = 0
    return replace(update, up=up, down=down)


def _told(manifest: Manifest, opened: Opened) -> dict[str, bool]:
    """Slots whose weight can be told as numbers, as many as memory is there for."""
    left, found = _MOST, {}
    for slot in manifest.slots:
        calls = opened[slot.path].values()
        first = next(iter(calls))
        size = first.shape[0] * first.shape[1] * torch.float32.itemsize if first.quantised else 0
        found[slot.path] = all(map(is_known, calls)) and size <= left
        left -= size if found[slot.path] else 0
    return found
