"""How far two updates of one layer, or two tensors, are apart."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from lora_fx.adapters.updates import AnyUpdate, length
from lora_fx.algebra.matrix_expr import Matrix, Sum, number, scaled
from lora_fx.algebra.truncation import size_of
from lora_fx.errors import AdapterError
from lora_fx.reference.base_weights import Base, Own
from lora_fx.reference.weight_change import Place, fitted

_NOISE = 1e-12  # of two equal sums that are made in float64


class UpdateDistance:
    """Compares what updates make of a base.

    Args:
        base: the model, or None.
    """

    def __init__(self, base: nn.Module | None) -> None:
        self._base = Base(base)

    @torch.no_grad()
    def of(self, path: str, one: AnyUpdate, other: AnyUpdate) -> float | None:
        """The norm of the difference over that of the first; None where it is not known."""
        try:
            (first, shift), (second, moved) = (self._made(path, update) for update in (one, other))
            if first.shape != second.shape:
                return None
            gaps = size_of(difference(second, first)), length(moved - shift)
            return _over(math.hypot(*gaps), math.hypot(size_of(first), length(shift)))
        except AdapterError:  # no base, or it is of another layer: by what they hold
            return _all_apart(one.tensors(), other.tensors()) if one.kind == other.kind else None

    def _made(self, path: str, update: AnyUpdate) -> tuple[Matrix, torch.Tensor]:
        """W' - W, and what is added to the bias."""
        own: Own = self._base.own(path, update)
        place = Place(own, fitted(update, own.layer))
        assert place.update is not None
        shift = place.update.shift(own.bias)
        nothing = torch.zeros(place.shape[0])
        return place.delta(), nothing if shift is None else shift


def difference(one: Matrix, other: Matrix) -> Matrix:
    """``one - other``."""
    return Sum(one, scaled(number(-1), other))


def tensors_apart(one: torch.Tensor, other: torch.Tensor) -> float | None:
    """The norm of the difference over that of the first; None of other shapes."""
    return _all_apart([one], [other])


def _all_apart(one: Iterable[torch.Tensor], other: Iterable[torch.Tensor]) -> float | None:
    first, second = ([tensor.double() for tensor in tensors] for tensors in (one, other))
    if [tensor.shape for tensor in first] != [tensor.shape for tensor in second]:
        return None
    gaps = (length(a - b) for a, b in zip(first, second, strict=True))
    return _over(math.hypot(*gaps), math.hypot(*map(length, first)))


def _over(gap: float, size: float) -> float:
    if gap <= _NOISE * size:
        return 0.0
    return gap / size if size else math.inf
