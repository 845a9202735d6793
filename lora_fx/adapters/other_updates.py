"""Updates beyond low rank: per-feature scaling, and functions of the weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from lora_fx.adapters.source_record import Stored
from lora_fx.adapters.updates import Shape, Update
from lora_fx.errors import AdapterError
from lora_fx.graph.ops import aten


@dataclass(frozen=True, eq=False)
class Scaling:
    """``W' = diag(row) W``, the bias scaled too, or ``W' = W diag(col)``: (IA)3.

    Source: Liu et al., arXiv:2205.05638.

    Attributes:
        row: (out,), or None.
        col: (in,), or None. One of the two is there.
        kind: ``"ia3"``.
        stored: what the file held.
    """

    row: torch.Tensor | None = None
    col: torch.Tensor | None = None
    kind: str = "ia3"
    stored: Stored | None = None

    def __post_init__(self) -> None:
        """Checks that there is one vector.

        Raises:
            AdapterError: there are none or two, or what is there is no vector.
        """
        vectors = list(self.tensors())
        if len(vectors) != 1 or vectors[0].ndim != 1:
            shapes = [tuple(vector.shape) for vector in vectors]
            raise AdapterError(f"a scaling has {shapes}: expected one vector, row or col")

    @property
    def shape(self) -> Shape:
        """(out, in) of the layer that it fits, as far as known; a kernel may follow."""
        out = None if self.row is None else len(self.row)
        return out, None if self.col is None else len(self.col)

    def tensors(self) -> Iterator[torch.Tensor]:
        """The vector that is there."""
        return (tensor for tensor in (self.row, self.col) if tensor is not None)

    def weight(self, base: torch.Tensor) -> torch.Tensor:
        """The weight form: W -> W', both (out, in, *kernel), in float32 or wider."""
        wide = base.to(torch.promote_types(base.dtype, torch.float32))
        if self.row is not None:
            return wide * self.row.reshape(-1, *[1] * (base.ndim - 1))
        assert self.col is not None
        return wide * self.col.reshape(1, -1, *[1] * (base.ndim - 2))

    def has_effect(self) -> bool:
        """Whether any input could tell this update from none."""
        return any(bool((tensor != 1).any()) for tensor in self.tensors())

    def is_finite(self) -> bool:
        """Whether every value is a finite number."""
        return all(bool(tensor.isfinite().all()) for tensor in self.tensors())


@dataclass(frozen=True, eq=False)
class WeightUpdate:
    """``W' = function(W, *values)`` and ``b' = b + bias``: LoKr, OFT, and whatever is dense.

    Attributes:
        kind: ``"lokr"``, ``"oft"``, ...
        function: from W and the values to W'. It is written in calls of ``torch.ops.aten``
            overloads alone, because a graph records it as it stands: what tests evaluate is what
            the graph computes.
        values: what the function takes beside W, every scale folded in.
        shape: (out, in, *kernel) of the layer that it fits, or (out, columns) where any kernel of
            as many columns does; None where any size does.
        stored: what the file held.
        bias: (out,), or None.
    """

    kind: str
    function: Callable[..., torch.Tensor]
    values: tuple[torch.Tensor, ...]
    shape: Shape
    stored: Stored | None = None
    bias: torch.Tensor | None = None

    def tensors(self) -> Iterator[torch.Tensor]:
        """The values, and the bias if there is one."""
        yield from self.values
        if self.bias is not None:
            yield self.bias

    def weight(self, base: torch.Tensor) -> torch.Tensor:
        """The weight form: W -> W', both (out, in, *kernel), in float32 or wider."""
        wide = torch.promote_types(base.dtype, torch.float32)
        values = [v.to(wide) if v.is_floating_point() else v for v in self.values]
        return self.function(base.to(wide), *values)

    def has_effect(self) -> bool:
        """Whether any input could tell this update from none: known beside its layer only."""
        return True

    def is_finite(self) -> bool:
        """Whether every value is a finite number."""
        return all(bool(tensor.isfinite().all()) for tensor in self.tensors())


def added(weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """``W + delta``: the function of every update that is a difference."""
    total: torch.Tensor = aten.add.Tensor(weight, delta)
    return total


AnyUpdate = Update | Scaling | WeightUpdate


def low_rank(update: AnyUpdate, purpose: str) -> Update:
    """The update, if it is a product of two factors and no vector.

    Args:
        update: of the layer there.
        purpose: what wants a plain product, for the message: ``"how='svd'"``.

    Raises:
        AdapterError: it is none; says of what kind it is.
    """
    if isinstance(update, Update) and update.is_plain:
        return update
    raise AdapterError(
        f"an update of kind {update.kind!r} is no plain product of two factors, which "
        f"{purpose} needs"
    )
