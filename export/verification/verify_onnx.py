"""A file that exists, whoever made it and when, against the eager model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
from torch import fx

from lora_fx.adapters.adapter import Adapter
from lora_fx.choices import takes
from lora_fx.errors import ExportError, VerificationError, shorten, within
from lora_fx.export.onnx_model.model_file import load_proto, manifest_in
from lora_fx.export.program.example_inputs import example_inputs
from lora_fx.export.program.export_unit import ExportUnit, export_unit
from lora_fx.export.program.planted import planted
from lora_fx.export.quantization.numbers import (
    of_whole_x,
    packed_in,
    scheme_in,
    with_numbers,
)
from lora_fx.export.report import Clock, ExportReport, Quantisation, Verification
from lora_fx.export.rewriting.file_layers import FileLayer
from lora_fx.export.runtime.ort import unreadable
from lora_fx.export.runtime.session import Session
from lora_fx.export.slots.adapter_file import export_adapter
from lora_fx.export.slots.manifest import Manifest
from lora_fx.export.verification.eager import evaluating
from lora_fx.export.verification.layers_apart import layers_apart
from lora_fx.export.verification.negative_controls import NO_ADAPTER, controls
from lora_fx.export.verification.references import reference
from lora_fx.export.verification.verify import verify_file
from lora_fx.graph.example import DTYPE, TASK, task_of
from lora_fx.graph.one_thread import one_at_a_time
from lora_fx.injection.invocation_mask import invocations_in
from lora_fx.io.atomic import scratch
from lora_fx.passes import FoldLora, InjectLora


@takes(ExportError, unreadable)
@one_at_a_time
def verify_onnx(
    gm: fx.GraphModule,
    path: str | Path,
    *,
    adapters: Sequence[Adapter] = (),
    progress: Callable[[str], None] | None = None,
) -> ExportReport:
    """Runs a file and eager models side by side, and a control that must differ.

    Args:
        gm: the traced model, which remembers its example inputs. It is not changed.
        path: the ``.onnx`` file; not changed.
        adapters: a file that takes adapters is run alone and with each; any other must hold
            their sum.
        progress: told the name of each stage as it starts.

    Raises:
        ExportError: the file cannot be read or run, or has other inputs or outputs.
        AdapterError: an adapter does not fit.
        VerificationError: the file and eager disagree, or the control agreed.
    """
    path, clock, session = Path(path), Clock(progress), Session(path)
    slots, inputs, outputs = session.slots, session.inputs, session.outputs
    proto = load_proto(path)
    mode = mode_of(proto, manifest_in(proto, path))
    del session  # its threads would disturb those that follow
    with clock.stage("prepare"):
        trial = _trial(gm, adapters)
        gm, adapters, quantised = _in_numbers(gm, path, adapters, merged=mode == "merged")
        with within(path):
            _check_names("inputs", inputs, trial.inputs)
            trial = _called_as(outputs, trial)
    with clock.stage("verify"), of_whole_x(path) as exact:
        evidence = _evidence(gm, exact, adapters, trial, swappable=bool(slots))
    evidence.judge(str(path))
    return ExportReport.of(
        path,
        evidence,
        clock,
        mode=mode,
        files={path.name: path.stat().st_size},
        opset=next(entry.version for entry in proto.opset_import if not entry.domain),
        notes=trial.notes,
        inputs=inputs,
        outputs=outputs,
        slots=slots,
        task=task_of(gm).get(TASK),
        dtype=task_of(gm).get(DTYPE),
        quantised=quantised,
    )


def _in_numbers(
    gm: fx.GraphModule, path: Path, adapters: Sequence[Adapter] = (), *, merged: bool = False
) -> tuple[fx.GraphModule, Sequence[Adapter], Quantisation | None]:
    """A graph with the numbers that a file stores in a few bits, which a merged one has of W'."""
    packed = packed_in(path)
    if not packed:
        return gm, adapters, None
    if merged:
        whole = InjectLora(list(adapters))(gm).graph_module if adapters else gm
        (gm, errors), adapters = _merged_in_numbers(whole, packed), ()
    else:
        gm, errors = with_numbers(gm, packed)
    return gm, adapters, Quantisation(scheme_in(packed), errors)


def _merged_in_numbers(
    gm: fx.GraphModule, packed: Mapping[str, FileLayer]
) -> tuple[fx.GraphModule, dict[str, float]]:
    """A file may be of a graph that was folded, which takes even ``x + W x`` for one layer.

    One that was merged by no more than files has W' of each layer alone.
    """
    try:
        return with_numbers(FoldLora()(gm).graph_module, packed)
    except VerificationError:
        return with_numbers(FoldLora()(layers_apart(gm)).graph_module, packed)


def mode_of(proto: onnx.ModelProto, manifest: Manifest | None) -> str:
    """What a file is, told by its slots, or else by the names of what it holds."""
    if manifest is not None and manifest.slots:
        return "required" if manifest.required else "swappable"
    names = (tensor.name for tensor in proto.graph.initializer)
    return "unmerged" if any(".lora_" in name for name in names) else "merged"


def check_adapter_files(
    gm: fx.GraphModule, path: Path, files: Sequence[tuple[Adapter | None, Path]]
) -> Verification:
    """Runs a swappable file with adapter files that were made for it, at the traced shape.

    Args:
        gm: the traced model without adapters.
        path: the ``.onnx`` file.
        files: each adapter, and the file that was made of it; None: of no adapter.

    Raises:
        VerificationError: the file and the module with the adapter disagree.
    """
    given = [adapter for adapter, _ in files if adapter is not None]
    if not given:  # the base was seen when the file was written
        return Verification()
    names = [value.name for value in load_proto(path).graph.output]
    trial = _called_as(names, _trial(gm, given))
    gm = _in_numbers(gm, path)[0]
    subjects = [
        reference("base", gm, file, once=True)
        if adapter is None
        else reference(adapter.name, InjectLora(adapter)(gm).graph_module, file, once=True)
        for adapter, file in files
    ]
    control = replace(reference("base", gm), what=NO_ADAPTER, notes=(), coverage=None)
    with of_whole_x(path) as exact:
        evidence = verify_file(exact, trial, subjects, [control])
    evidence.judge(str(path))
    return evidence


def _trial(gm: fx.GraphModule, adapters: Sequence[Adapter]) -> ExportUnit:
    """A graph on inputs that adapters act at."""
    given = [update.invocation for a in adapters for update in a.updates.values()]
    inputs = example_inputs(gm, None, None, None)
    return export_unit(evaluating(gm), planted(inputs, gm, [*invocations_in(gm), *given]))


def _check_names(what: str, of_file: list[str], of_model: list[str]) -> None:
    if of_file != of_model:
        raise ExportError(
            f"has {what} {shorten(of_file)}; the model it is held against has "
            f"{shorten(of_model)}: is it another model?"
        )


def _called_as(outputs: list[str], trial: ExportUnit) -> ExportUnit:
    """A unit whose outputs are called as a file calls them, which may have been asked for."""
    is_known = trial.generates or sorted(outputs) == sorted(trial.outputs)
    if is_known or len(outputs) != len(trial.outputs):
        _check_names("outputs", outputs, trial.outputs)
    return replace(trial, outputs=outputs)


def _evidence(
    gm: fx.GraphModule, path: Path, adapters: Sequence[Adapter], trial: ExportUnit, swappable: bool
) -> Verification:
    if not (swappable and adapters):
        whole = InjectLora(list(adapters))(gm).graph_module if adapters else gm
        return verify_file(path, trial, [reference("model", whole)], controls(whole))
    subjects = [replace(reference("base", gm), coverage=None)]
    with scratch() as directory:
        for adapter in adapters:
            adapted = InjectLora(adapter)(gm).graph_module
            file = directory / f"{len(subjects)}.onnx_adapter"
            export_adapter(adapter, path, file, check=False)  # the session did
            subjects.append(reference(adapter.name, adapted, file))
        return verify_file(path, trial, subjects, controls(adapted))
