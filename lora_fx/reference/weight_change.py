"""What an update makes of the weight of its layer: W' - W as one matrix, whatever the layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from lora_fx.adapters.updates import AnyUpdate, Update
from lora_fx.algebra.low_rank import NotLowRankError, additive, beside, blocks_beside
from lora_fx.algebra.matrix_expr import Leaf, Matrix, Sum, constant, number, scaled
from lora_fx.algebra.truncation import total
from lora_fx.injection.conform import conform
from lora_fx.layers.layer import Layer
from lora_fx.reference.base_weights import Own
from lora_fx.reference.merged_parameters import ungrouped


@dataclass(frozen=True)
class Place:
    """The matrix of a layer that an update is of: of all groups at once, if it mixes them.

    Attributes:
        own: the layer.
        update: in its shape; None where its weight is replaced and no more.
    """

    own: Own
    update: AnyUpdate | None

    @property
    def _mixes(self) -> bool:
        layer, update = self.own.layer, self.update
        if layer is None or update is None or layer.groups == 1 or update.makes_anew:
            return False
        return update.shape[1] == layer.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, *kernel)."""
        if self.own.layer is not None:
            return self.own.layer.shape if self._mixes else self.own.layer.own_shape
        assert self.update is not None
        if None in self.update.shape:
            self.own.weight()  # without a base, which is what is missing
        return tuple(size or 0 for size in self.update.shape)

    def delta(self, value: torch.Tensor | None = None) -> Matrix:
        """W' - W, which asks for W only where it depends on it.

        Args:
            value: what takes the place of its weight, if anything.
        """
        out, *rest = self.shape
        base = Leaf((out, math.prod(rest)), "base", lambda: self.matrix(self.own.weight()))
        start = base if value is None else constant(self.matrix(value))
        whole = start if self.update is None else self.update.of(start)
        try:
            found = beside(base, additive(base, whole))
        except NotLowRankError:
            found = None
        if found is not None and found.added and found.row is None and found.col is None:
            return total(found.added)
        return Sum(whole, scaled(number(-1), base))

    def matrix(self, stored: torch.Tensor) -> torch.Tensor:
        """A weight as the model stores it, as (out, in * kernel)."""
        layer = self.own.layer
        if layer is None:
            return stored.flatten(1)
        own = layer.type.canonical("weight", stored, layer.groups)
        return (ungrouped(own, layer.groups) if self._mixes else own).flatten(1)


def blocks(update: AnyUpdate) -> tuple[torch.Tensor, torch.Tensor]:
    """Both factors for each matrix of a parameter that holds several, in float64.

    Raises:
        NotLowRankError: it is no product for each of them.
    """
    shape = [size or 0 for size in update.shape]
    base = constant(torch.empty(shape, device="meta"))
    left, right = blocks_beside(base, update.of(base))
    return left.double(), right.double()


def fitted(update: AnyUpdate, layer: Layer | None) -> AnyUpdate:
    """An update in the shape of its layer, or of the weight of a grouped one."""
    if layer is None:
        return update
    fit = conform(update, layer)
    if isinstance(update, Update) and not isinstance(fit, Update):
        return replace(update, down=update.down.reshape(-1, *layer.own_shape[1:]))
    return fit
