"""The exported file against eager, and against a control that must not agree."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_fx.errors import AdapterWarning, VerificationError, shorten
from lora_fx.export.onnx_model.model_file import load_proto, manifest_in
from lora_fx.export.program.export_unit import ExportUnit
from lora_fx.export.program.shape_variants import Case
from lora_fx.export.report import Reference, Verification
from lora_fx.export.runtime.active_adapter import ActiveAdapter, activated
from lora_fx.export.runtime.in_place import writes_in_place
from lora_fx.export.runtime.ort import call, open_session
from lora_fx.export.verification.eager import EAGER_ERRORS, Tensors, run_eager
from lora_fx.export.verification.negative_controls import NO_ADAPTER, NO_ADAPTERS
from lora_fx.export.verification.other_sizes import hold_beyond
from lora_fx.export.verification.rollout import rollout
from lora_fx.export.verification.rows import Row, allowance, precision, same_type
from lora_fx.export.verification.suspects import suspects
from lora_fx.io.atomic import data_path
from lora_fx.numerics import compare
from lora_fx.reference.reference_run import WeightForm


def verify_file(
    path: Path, trial: ExportUnit, subjects: Sequence[Reference], controls: Iterable[Reference]
) -> Verification:
    """Runs a file and eager models on the same inputs.

    Args:
        path: the model file.
        trial: what to run.
        subjects: what the file must agree with; the last is what the control is held against.
        controls: candidates for what it must not agree with, best first.

    Returns:
        All rows, right or wrong.
    """
    proto = load_proto(path)
    trial, in_place = trial.taken_by(proto), writes_in_place(proto)
    del proto
    evidence = Verification(notes=[note for subject in subjects for note in subject.notes])
    expected = [_expected(s, trial.cases, trial.outputs, evidence) for s in subjects]
    for subject, wanted in zip(subjects, expected, strict=True):
        evidence.notes += _not_finite(subject, trial.outputs, wanted)
    first = trial.cases[0]
    known = {id(s.eager): e[first.label] for s, e in zip(subjects, expected, strict=True)}
    control, base = _choose(controls, first, expected[-1][first.label], known, evidence)
    evidence.coverage = [
        replace(subject.coverage, off=_off(wanted[first.label], base))
        for subject, wanted in zip(subjects, expected, strict=True)
        if subject.coverage is not None
    ]
    threads = torch.get_num_threads() if data_path(path).exists() else 1  # worth it if large
    at_first: list[Any] = []  # in the end, of the last subject, optimised
    allowed: list[float] = []  # there
    for optimise in (False, True):
        session = open_session(path, threads=threads, optimise=optimise, to_check=True)
        for subject, wanted in zip(subjects, expected, strict=True):
            active = _activated(session, path, subject, trial, bound=in_place)
            for case in (case for case in trial.cases if case.label in wanted):
                found = _run(session, active, trial, case)
                row = Row(subject, case, optimise)
                rows = row.compare(trial.outputs, found, wanted[case.label])
                evidence.checks += rows
                if case is first:
                    at_first, allowed = found, [row.tolerance for row in rows]
                if not all(row.ok for row in rows) and not evidence.suspects:
                    evidence.suspects += _other_types(trial.outputs, found, wanted[case.label])
                    _suspect(subject, case, found, wanted[case.label], base, evidence)
            if trial.generates and subject.generates and optimise:
                dtype = precision(subject.graph)
                check = rollout(subject, session, active, trial, dtype, in_place=in_place)
                evidence.checks.append(check)
        modules = [s for s in subjects if isinstance(s.eager, WeightForm) and not s.once]
        if optimise and modules and all(row.ok for row in evidence.checks):
            active = _activated(session, path, modules[0], trial, bound=in_place)
            run = partial(_run, session, active.silenced(), trial)
            hold_beyond(modules[0], run, trial, evidence)
        del session  # one thread pool at a time
    if control is not None:
        other, wrong = control
        row = Row(other, first, optimise=True)
        rows = row.compare(trial.outputs, at_first, wrong, allowed)
        evidence.controls += [replace(row, ok=not row.ok) for row in rows]
    return evidence


def _expected(
    subject: Reference, cases: Sequence[Case], wanted: Sequence[str], evidence: Verification
) -> dict[str, Tensors]:
    """Eager's outputs by case; a shape that eager cannot run is noted, the traced one must."""
    outputs = {cases[0].label: run_eager(subject.eager, cases[0])}
    _check_count(subject, outputs[cases[0].label], wanted)
    if subject.once:
        return outputs
    for case in cases[1:]:
        try:
            outputs[case.label] = run_eager(subject.eager, case)
        except EAGER_ERRORS as error:
            reason = str(error).partition("\n")[0]
            evidence.notes.append(f"{subject.what}: eager fails at {case.label}, skipped: {reason}")
    if len(outputs) == 1:
        evidence.notes.append(f"{subject.what}: checked at the traced shape only")
    return outputs


def _check_count(subject: Reference, found: Tensors, wanted: Sequence[str]) -> None:
    if len(found) != len(wanted):
        raise VerificationError(
            f"{subject.what}: the module that was traced returns {len(found)} tensors, the file "
            f"has {len(wanted)} outputs: {shorten(list(wanted))}. A graph that was changed on "
            "purpose is the model of its own: trace it, lora_fx.trace(gm, args)"
        )


def _not_finite(
    subject: Reference, names: Sequence[str], found: dict[str, Tensors]
) -> Iterator[str]:
    """What of eager's outputs is no number: there the file is only held to be no number too."""
    for place, name in enumerate(names):
        values = [outputs[place] for outputs in found.values()]
        count = sum(int((~value.isfinite()).sum()) for value in values)
        if count:
            total = sum(value.numel() for value in values)
            yield f"{subject.what}: output {name!r}: {count} of {total} values are NaN or infinite"


def _choose(
    candidates: Iterable[Reference],
    case: Case,
    expected: Tensors,
    known: Mapping[int, Tensors],
    evidence: Verification,
) -> tuple[tuple[Reference, Tensors] | None, Tensors | None]:
    """The first candidate that eager itself can tell from the model, and its outputs.

    Returns:
        That, and the outputs of the base, if it was one of those that were tried.
    """
    base = None
    for control in candidates:
        found = known.get(id(control.eager)) or run_eager(control.eager, case)
        base = found if control.what.startswith(NO_ADAPTER) else base
        if _differ(found, expected, precision(control.graph)):
            return (control, found), base
        if control.what == NO_ADAPTERS:
            message = "the adapters change no output: is that what was meant?"
            warnings.warn(AdapterWarning(message), stacklevel=2)
            evidence.notes.append(message)
    evidence.notes.append("no control: nothing that was tried changes an output")
    return None, base


def _off(found: Tensors, base: Tensors | None) -> float | None:
    """How far outputs are from those of the base, the farthest of them."""
    if base is None:
        return None
    numbers = [(a, b) for a, b in zip(found, base, strict=True) if b.is_floating_point()]
    return max((compare(a, b).relative for a, b in numbers), default=None)


def _suspect(
    subject: Reference,
    case: Case,
    found: list[Any],
    expected: Tensors,
    base: Tensors | None,
    evidence: Verification,
) -> None:
    if isinstance(subject.eager, WeightForm) and subject.coverage is not None:
        at_case = base if case.label == evidence.checks[0].shape else None
        evidence.suspects += suspects(subject.eager, subject.graph, case, found, expected, at_case)


def _other_types(
    names: Sequence[str], found: Sequence[np.ndarray[Any, Any]], expected: Tensors
) -> Iterator[str]:
    """What a row of numbers does not show."""
    for name, actual, wanted in zip(names, found, expected, strict=True):
        if not same_type(actual, wanted):
            kind = str(wanted.dtype).removeprefix("torch.")
            yield (
                f"output {name!r} is {actual.dtype}, eager's is {kind}. If both are one model, a "
                f"cast was lost by torch.onnx: compute it in {actual.dtype} there, and cast it to "
                f"{kind}"
            )


def _differ(found: Tensors, expected: Tensors, dtype: torch.dtype) -> bool:
    pairs = zip(found, expected, strict=True)
    return any(not compare(a, e, allowance(e, dtype)).ok for a, e in pairs)


def _activated(
    session: Any, path: Path, subject: Reference, trial: ExportUnit, *, bound: bool
) -> ActiveAdapter:
    """The adapter of a subject; a file that takes more than its model does requires its slots."""
    is_fed = len(session.get_inputs()) > len(trial.inputs)
    manifest = manifest_in(load_proto(path), path) if is_fed else None
    return activated(session, path, manifest, subject.adapter, bound=bound)


def _run(session: Any, active: ActiveAdapter, trial: ExportUnit, case: Case) -> list[Any]:
    outputs = call(session, trial.feeds(case) | active.feeds, active.options)
    return [outputs[name] for name in trial.outputs]
