"""An exported file, whoever made it and when, against the eager model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import fx

from lora_fx.adapter import Adapter
from lora_fx.api import inject
from lora_fx.errors import ExportError, shorten

if TYPE_CHECKING:
    from lora_fx.export import ExportReport
    from lora_fx.export.evidence import Evidence
    from lora_fx.export.trial import Trial


def verify_existing(
    path: Path, base: fx.GraphModule, adapters: Sequence[Adapter], progress: Callable[[str], None]
) -> ExportReport:
    """Runs a file and eager models side by side, and a control that must differ.

    Args:
        path: the file; not changed.
        base: the traced model, without adapters.
        adapters: a swappable file runs alone and with each; any other must hold their sum.
        progress: told the name of each stage.

    Raises:
        LoraFxError: the file cannot be read or run, or an adapter does not fit.
        VerificationError: the file and eager disagree, or the control agreed.
    """
    from lora_fx.export import ExportReport, Session
    from lora_fx.export.model_file import load_proto
    from lora_fx.export.report import Clock

    session, clock = Session(path), Clock(progress)
    slots, inputs, outputs = session.slots, session.inputs, session.outputs
    del session  # its threads would disturb those that follow
    with clock.stage("prepare"):
        trial = _trial(base, inputs, outputs)
    with clock.stage("verify"):
        evidence = _evidence(path, base, adapters, trial, bool(slots))
    evidence.judge(str(path))
    return ExportReport(
        path=str(path),
        mode="input" if slots else "constant",
        files={path.name: path.stat().st_size},
        opset=next(e.version for e in load_proto(path).opset_import if not e.domain),
        seconds=clock.seconds,
        checks=evidence.checks,
        controls=evidence.controls,
        notes=evidence.notes,
        inputs=inputs,
        outputs=outputs,
        slots=slots,
    )


def _trial(base: fx.GraphModule, inputs: list[str], outputs: list[str]) -> Trial:
    from lora_fx.export.convert import evaluating
    from lora_fx.export.inputs import example_inputs
    from lora_fx.export.trial import trial_of

    trial = trial_of(evaluating(base), example_inputs(base, None, None, None))
    _check_names("inputs", inputs, trial.inputs)
    _check_names("outputs", outputs, trial.outputs)
    return trial


def _check_names(what: str, of_file: Sequence[str], of_model: Sequence[str]) -> None:
    if list(of_file) != list(of_model):
        raise ExportError(
            f"--against: the model has {what} {shorten(list(of_model))}, the file has "
            f"{shorten(list(of_file))}: is it another model?"
        )


def _evidence(
    path: Path, base: fx.GraphModule, adapters: Sequence[Adapter], trial: Trial, swappable: bool
) -> Evidence:
    from lora_fx.export import export_adapter
    from lora_fx.export.controls import controls
    from lora_fx.export.convert import evaluating
    from lora_fx.export.evidence import Subject
    from lora_fx.export.verify import verify_file

    if not (swappable and adapters):
        gm = inject(base, list(adapters)) if adapters else base
        return verify_file(path, trial, [Subject("model", evaluating(gm))], controls(gm))
    with tempfile.TemporaryDirectory() as directory:
        subjects = [Subject("base", evaluating(base))]
        for adapter in adapters:
            adapted, file = inject(base, adapter), Path(directory) / f"{adapter.name}.onnx_adapter"
            export_adapter(adapter, path, file)
            subjects.append(Subject(adapter.name, evaluating(adapted), file))
        return verify_file(path, trial, subjects, controls(adapted))
