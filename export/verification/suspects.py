"""After a file was refused: which update it seems to lack."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

from lora_fx.export.program.shape_variants import Case
from lora_fx.export.verification.eager import Tensors, evaluating, run_eager
from lora_fx.numerics import compare
from lora_fx.reference.reference_run import WeightForm

_TRIED = 64
_NEARER = 0.9


def suspects(
    form: WeightForm,
    graph: fx.GraphModule,
    case: Case,
    found: Sequence[Any],
    expected: Tensors,
    base: Tensors | None,
) -> Iterator[str]:
    """Names what the file would agree without, or at least come nearer.

    Args:
        form: what it was held against.
        graph: what it was made of.
        case: the inputs.
        found: what the file gave.
        expected: what the model gave.
        base: what the model gives without any adapter, if it is known.
    """
    if base is not None and _distance(found, base)[1]:
        yield "the file agrees with the base: no update acts in it"
        return
    start, _ = _distance(found, expected)
    nearest, where = start * _NEARER, ""
    for place, (path, without) in enumerate(form.each_without()):
        if place == _TRIED:
            break
        distance, agrees = _distance(found, run_eager(without, case))
        if agrees:
            yield f"the file agrees without the update of {path}: it was lost"
            return
        if distance < nearest:
            nearest, where = distance, path
    if _distance(found, run_eager(evaluating(graph), case))[1]:
        yield (
            "the file agrees with the graph, and that no more with its module: where tensors were "
            "changed since it was folded (a step of an optimiser, load_state_dict), fold again; a "
            "graph that was changed on purpose is a model of its own: trace it"
        )
    elif where:
        numbers = f"{nearest:.1e} instead of {start:.1e}"
        yield f"the file is nearest without the update of {where}: {numbers}"


def _distance(found: Sequence[Any], expected: Tensors) -> tuple[float, bool]:
    pairs = zip(found, expected, strict=True)
    rows = [compare(a, e, e.dtype if e.is_floating_point() else None) for a, e in pairs]
    return max((row.relative for row in rows), default=0.0), all(row.ok for row in rows)
