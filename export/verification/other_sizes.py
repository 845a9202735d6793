"""A file and its model at sizes that it was not traced for: Python code may ask for a size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lora_fx.errors import ExportError, VerificationError, is_out_of_memory
from lora_fx.export.program.export_unit import ExportUnit
from lora_fx.export.program.shape_variants import Case
from lora_fx.export.report import Reference, Verification
from lora_fx.export.verification.eager import Tensors, run_eager
from lora_fx.export.verification.rows import Row


def hold_beyond(
    subject: Reference,
    run: Callable[[Case], list[Any]],
    trial: ExportUnit,
    evidence: Verification,
) -> None:
    """Holds a file to its model at sizes that it was not traced for: right, or not taken.

    Raises:
        VerificationError: the file takes them, and gives something else.
    """
    for together, *alone in trial.beyond:
        found = {together.label: _is_held(together, subject, run, trial, evidence)}
        if alone and not found[together.label]:
            found = {each.label: _is_held(each, subject, run, trial, evidence) for each in alone}
        refused = [label for label, is_held in found.items() if is_held is False]
        evidence.notes += [f"{where}: the file refuses it, the model takes it" for where in refused]


def _is_held(
    case: Case,
    subject: Reference,
    run: Callable[[Case], list[Any]],
    trial: ExportUnit,
    evidence: Verification,
) -> bool | None:
    """Whether the file gives what the model gives, or refuses; None if the model itself fails."""
    try:
        wanted = run_eager(subject.eager, case)
    except Exception as error:  # the model's own code may raise anything at a size that is not its
        if is_out_of_memory(error):
            evidence.notes.append(f"{subject.what}: not tried at {case.label}: memory is short")
        return None
    try:
        found = run(case)
    except ExportError:
        return False
    if len(found) == len(wanted):
        rows = Row(subject, case, optimise=True).compare(*_told(trial.outputs, found, wanted))
        evidence.checks += rows
        wrong = [str(row) for row in rows if not row.ok]
    else:
        wrong = [f"FAIL the model returns {len(wanted)} tensors, the file {len(found)}"]
    if wrong:
        table = "\n".join(wrong)
        raise VerificationError(
            f"{subject.what}: it takes another way at {case.label} than at {trial.example.label}, "
            f"for which it was traced, and the file would be wrong there without a word:\n{table}\n"
            "Say the condition on the size with tensors (torch.where), trace with the sizes that "
            "are used, or say in dynamic_shapes which are meant, by "
            "torch.export.Dim(name, max=...), or Dim.DYNAMIC(max=...) where it refuses that"
        )
    return True


def _told(
    names: Sequence[str], found: list[Any], wanted: Tensors
) -> tuple[list[str], list[Any], Tensors]:
    """The outputs with a number on either side: the deviation of one thing has none on both."""
    outputs = zip(names, found, wanted, strict=True)
    told = [each for each in outputs if any(_has_numbers(value) for value in each[1:])]
    return [n for n, _, _ in told], [a for _, a, _ in told], [e for _, _, e in told]


def _has_numbers(value: Any) -> bool:
    values = torch.as_tensor(value)
    return not values.numel() or bool(values.isfinite().any())
