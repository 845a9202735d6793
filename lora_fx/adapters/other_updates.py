"""Updates beyond low rank: per-feature scaling, and whatever else is an expression in W."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from lora_fx.adapters.source_record import SourceRecord
from lora_fx.adapters.updates import AnyUpdate, Bias, Shape, Stacks, Update, length
from lora_fx.algebra.evaluate import weight_of_shape
from lora_fx.algebra.index_expr import Index
from lora_fx.algebra.matrix_expr import (
    Matrix,
    Sum,
    columns_scaled,
    constant,
    diagonal,
    exchanged,
    holding,
    leaves,
    normed,
    product,
    reshaped,
    scaled,
)
from lora_fx.errors import AdapterError

Function = Callable[[Matrix], Matrix]


@dataclass(frozen=True, eq=False)
class Scaling(AnyUpdate):
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
    stored: SourceRecord | None = None

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
    def shape(self) -> Shape:  # type: ignore[override]
        """(out, in) of the layer that it fits, as far as known; a kernel may follow."""
        out = None if self.row is None else len(self.row)
        return out, None if self.col is None else len(self.col)

    def of(self, weight: Matrix) -> Matrix:
        """W' of W, both (out, in * kernel)."""
        if self.row is not None:
            return scaled(constant(self.row), weight)
        assert self.col is not None
        return columns_scaled(weight, constant(self.col))

    def shift(self, own: Bias) -> torch.Tensor | None:
        """``(row - 1) b``, in float32 or wider, or None."""
        bias = None if self.row is None else own()
        if self.row is None or bias is None:
            return None
        wide = torch.promote_types(bias.dtype, torch.float32)
        return (self.row.to(wide) - 1) * bias.to(wide)

    def tensors(self) -> Iterator[torch.Tensor]:
        """The vector that is there."""
        return (tensor for tensor in (self.row, self.col) if tensor is not None)

    def has_effect(self) -> bool:
        """Whether any input could tell this update from none."""
        return any(bool((tensor != 1).any()) for tensor in self.tensors())


@dataclass(frozen=True, eq=False)
class WeightUpdate(AnyUpdate):
    """``W' = function(W)``, any expression in W, and ``b' = b + bias``: LoKr, OFT, what is dense.

    Attributes:
        kind: ``"lokr"``, ``"oft"``, ...
        function: from W, a matrix of (out, in * kernel), to W'. Its leaves are the update's values,
            every scale folded in: the same tensors whatever W is, not made in the function.
        shape: (out, in, *kernel) of the layer that it fits, or (out, columns) where any kernel of
            as many columns does; None where any size does.
        stored: what the file held.
        bias: (out,), or None.
        stacks: as `Stacks` says.
    """

    kind: str
    function: Function
    shape: Shape
    stored: SourceRecord | None = None
    bias: torch.Tensor | None = None
    stacks: Stacks = "if added"
    makes_anew = True

    def __copy__(self) -> WeightUpdate:
        """Itself, which nobody changes."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightUpdate:
        """Itself, which nobody changes."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Refuses to be pickled.

        Raises:
            AdapterError: always.
        """
        raise AdapterError(
            f"an update of kind {self.kind!r} holds a function, which cannot be pickled: save its "
            "adapter (lora_fx.save_adapter), and load that where it is needed"
        )

    def of(self, weight: Matrix) -> Matrix:
        """W' of W."""
        return self.function(weight)

    @cached_property
    def leaves(self) -> Mapping[Hashable, torch.Tensor]:  # type: ignore[override]
        """The values by key, in the order of the expression."""
        weight = weight_of_shape(self.shape)
        every = {leaf.key: leaf for leaf in leaves(self.of(weight)) if leaf.key != weight.key}
        makes = ((k, n.places if isinstance(n, Index) else n.fetch) for k, n in every.items())
        return {key: make() for key, make in makes}

    def with_values(self, values: Sequence[torch.Tensor]) -> WeightUpdate:
        """The same of other values, as many and in the same order."""
        known = dict(zip(self.leaves, values, strict=True))

        def change(leaf: Any) -> Any:
            return holding(leaf, known[leaf.key]) if leaf.key in known else leaf

        return replace(self, function=lambda weight: exchanged(self.of(weight), change))

    def with_magnitude(self, magnitude: torch.Tensor) -> WeightUpdate:
        """An expression that ends with it."""
        column = magnitude.reshape(-1, 1)

        def function(weight: Matrix) -> Matrix:
            return normed(constant(column), self.of(weight))

        return replace(self, function=function, stacks="if added")

    def tensors(self) -> Iterator[torch.Tensor]:
        """The values, and the bias if there is one."""
        yield from self.values
        if self.bias is not None:
            yield self.bias

    def measures(self) -> dict[str, Any]:
        """The norms of the values that are no places."""
        return {"norms": [length(value) for value in self.values if value.is_floating_point()]}


def added(delta: torch.Tensor) -> Function:
    """``W + delta``: the expression of every update that is a difference."""
    return lambda weight: Sum(weight, constant(delta, weight.shape))


def added_to_each(left: torch.Tensor, right: torch.Tensor) -> Function:
    """``W[e] + left[e] @ right[e]`` for every e, of (blocks, rows, r) and (blocks, r, columns).

    Of two matrices, ``W + left @ right``.
    """
    if left.ndim == 2:
        whole = product(constant(left), constant(right))
        return lambda weight: Sum(weight, whole)
    delta = product(diagonal(left), constant(right, (right[..., 0].numel(), right.shape[2])))
    return lambda weight: Sum(weight, reshaped(delta, len(left)))


def evaluated(update: Update, shape: Shape, stored: SourceRecord | None) -> WeightUpdate:
    """``W + delta``, of a product that was multiplied: for a layer with no form in two factors."""
    bias = update.shift(lambda: None)
    return WeightUpdate(update.kind, added(update.delta()), shape, stored, bias)


def anew(update: AnyUpdate) -> AnyUpdate:
    """The same as a function of the weight: for what is read where nothing can stand beside it."""
    if update.makes_anew:
        return update
    function: Function = update.of
    if isinstance(update, Update) and update.is_product and update.groups == 1:
        down, up, _ = update.factors(update.wide(torch.float32))
        function = added_to_each(up, down.flatten(1))
    bias = update.shift(lambda: None)
    return WeightUpdate(update.kind, function, update.shape, update.stored, bias)


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


__all__ = ["AnyUpdate", "Scaling", "WeightUpdate", "added", "anew", "evaluated", "low_rank"]
