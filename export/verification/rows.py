"""Rows of a verification: what a file gave beside what it had to give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from lora_fx.export.program.shape_variants import Case
from lora_fx.export.report import Check, Reference
from lora_fx.export.verification.eager import Tensors
from lora_fx.export.verification.rounding import WIDER, tolerances
from lora_fx.graph.graph_module import targets
from lora_fx.graph.lazy_tensor import LazyTensor, get_unevaluated
from lora_fx.graph.ops import AUTOCAST
from lora_fx.numerics import coarsest, compare


class Row:
    """The part of a row that all outputs of one run share."""

    def __init__(self, subject: Reference, case: Case, optimise: bool) -> None:
        self._head = (subject.what, case.label, "all" if optimise else "off")
        self._subject, self._case = subject, case
        self._dtype = precision(subject.graph)

    def compare(
        self,
        names: Sequence[str],
        found: Sequence[np.ndarray[Any, Any]],
        expected: Tensors,
        allowed: Sequence[float] | None = None,
    ) -> list[Check]:
        """A row for each output, which is allowed what the table says, or what eager rounds."""
        rows = list(self._checks(names, found, expected, allowed))
        if allowed is not None or self._dtype not in WIDER or all(row.ok for row in rows):
            return rows
        wider = tolerances(self._subject, self._case, expected, self._dtype)
        return list(self._checks(names, found, expected, wider))

    def _checks(
        self,
        names: Sequence[str],
        found: Sequence[np.ndarray[Any, Any]],
        expected: Tensors,
        allowed: Sequence[float] | None,
    ) -> Iterator[Check]:
        for place, (name, actual, wanted) in enumerate(zip(names, found, expected, strict=True)):
            result = compare(actual, wanted, allowance(wanted, self._dtype))
            if allowed is not None:
                result = replace(result, tolerance=allowed[place])
            numbers = (result.max_abs, result.relative, result.tolerance)
            yield Check(*self._head, name, *numbers, result.ok and same_type(actual, wanted))


def precision(gm: fx.GraphModule) -> torch.dtype:
    """The coarsest type of the weights, or of autocast: what the outputs can be held to."""
    return coarsest(_dtypes(gm))


def _dtypes(gm: fx.GraphModule) -> Iterator[torch.dtype]:
    for target in targets(gm.graph):
        value = get_unevaluated(gm, target)
        if isinstance(value, nn.Module):
            yield from (tensor.dtype for tensor in (*value.parameters(), *value.buffers()))
        elif isinstance(value, torch.Tensor | LazyTensor):
            yield value.dtype
    for node in gm.graph.find_nodes(op="call_function", target=AUTOCAST):
        _, dtype, is_on, *_ = node.args
        if is_on and isinstance(dtype, torch.dtype):
            yield dtype


def allowance(wanted: torch.Tensor, dtype: torch.dtype) -> torch.dtype | None:
    """Numbers are held to the model's precision, or their own; all others must be equal."""
    return coarsest((dtype, wanted.dtype)) if wanted.is_floating_point() else None


def same_type(actual: np.ndarray[Any, Any], wanted: torch.Tensor) -> bool:
    """Whether two outputs are of one type."""
    return str(actual.dtype) == str(wanted.dtype).removeprefix("torch.")
