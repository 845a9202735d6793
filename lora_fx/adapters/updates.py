"""What an update of a layer is: a weight W' as an expression in W; and the one of low rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, replace
from functools import reduce
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch

from lora_fx.adapters.source_record import SourceRecord, kept
from lora_fx.algebra.evaluate import dense, weight_of_shape
from lora_fx.algebra.low_rank import is_added
from lora_fx.algebra.matrix_expr import (
    DiagMul,
    Matrix,
    Quotient,
    RowNorm,
    Sum,
    columns_scaled,
    constant,
    diagonal,
    number,
    product,
    scaled,
)
from lora_fx.algebra.truncation import cut, of_product
from lora_fx.choices import takes
from lora_fx.errors import AdapterError

NO_WEIGHT = (
    "it acts from its invocation tokens on (aLoRA), and not before them: no one weight says it"
)
# What an update acts on that makes a weight anew where another adapter has made it: what that made,
# if all that it does is to add; whatever weight there is; likewise, but before its like, since it
# acts on what the layer reads; or never anything but the base's own.
Stacks = Literal["if added", "on any", "inputs first", "never"]
U = TypeVar("U", bound="AnyUpdate")
Shape = tuple[int | None, ...]
Bias = Callable[[], torch.Tensor | None]


class AnyUpdate(Protocol):
    """What acts on a layer: ``of`` defines W', the rest says what it is made of.

    Attributes:
        kind: what the file said: ``"lora"``, ``"rslora"``, ``"loha"``, ...
        shape: (out, in, *kernel) of the layer that it fits, None where any size does.
        bias: (out,), what `shift` adds to the layer's bias, perhaps scaled, or None.
        stored: what the file held, where that is not just what it is made of.
        rank: the inner dimension of a product of two factors, None where there is none.
        groups: of the up-projection: 1, but beside a grouped convolution.
        is_plain: whether it is a product of two factors, and at most a bias: LoRA in effect.
        makes_anew: whether a graph computes W' itself, as nothing that stands beside can.
        leaves: what a graph then makes W' of, by the keys that the expression has.
        invocation: the tokens from whose last occurrence on W' is in place of W, in each row of
            ``input_ids``; where there are none of them, W is. Empty: W' is everywhere.
        stacks: where another adapter has made the weight anew, what it may act on (`Stacks`).
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    kind: str
    shape: Shape
    bias: torch.Tensor | None = None
    stored: SourceRecord | None = None
    rank: int | None = None
    groups: int = 1
    is_plain: bool = False
    makes_anew: bool = False
    leaves: Mapping[Hashable, torch.Tensor] = MappingProxyType({})
    invocation: tuple[int, ...] = ()
    stacks: Stacks = "if added"

    def of(self, weight: Matrix) -> Matrix:
        """W' of W, both matrices of (out, in * kernel): the definition of the update."""

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that it is made of."""

    def has_effect(self) -> bool:
        """Whether any input could tell this update from none, as far as is known without W."""
        return True

    def measures(self) -> dict[str, Any]:
        """Its rank, its scale, and the norms of its vectors, for a report."""
        vectors = {name: getattr(self, name, None) for name in ("bias", "magnitude", "row", "col")}
        norms = {f"{name}_norm": length(v) for name, v in vectors.items() if v is not None}
        return norms | ({"invocation": list(self.invocation)} if self.invocation else {})

    def shift(self, own: Bias) -> torch.Tensor | None:
        """What is added to the layer's bias, which is asked for if it is scaled; or None."""
        return self.bias

    def with_magnitude(self, magnitude: torch.Tensor) -> AnyUpdate:
        """The update, every row of W' at the length that (out,) says: DoRA."""
        raise AdapterError(f"a magnitude beside kind {self.kind!r}, which has none")

    @property
    def stored_tensors(self) -> Mapping[str, torch.Tensor]:
        """What the file held of the layer, by leaf; none where it was not read from one."""
        return {} if self.stored is None else self.stored.tensors

    @property
    def stored_settings(self) -> Mapping[str, Any]:
        """What it was read with."""
        return {} if self.stored is None else self.stored.settings

    @property
    def values(self) -> tuple[torch.Tensor, ...]:
        """The leaves without their keys."""
        return tuple(self.leaves.values())

    @property
    def is_added(self) -> bool:
        """Whether W' - W is the same whatever W is, as far as the expression shows."""
        weight = weight_of_shape(self.shape)
        return is_added(weight, self.of(weight))

    def is_finite(self) -> bool:
        """Whether every value is a finite number."""
        return all(bool(tensor.isfinite().all()) for tensor in self.tensors())

    def wide(self, dtype: torch.dtype) -> torch.dtype:
        """What is computed in beside numbers of a dtype: float32 or wider."""
        own = (tensor.dtype for tensor in self.tensors() if tensor.is_floating_point())
        return reduce(torch.promote_types, own, torch.promote_types(dtype, torch.float32))

    def weight(self, base: torch.Tensor) -> torch.Tensor:
        """The weight form: W -> W', both (out, in, *kernel), in float32 or wider.

        Raises:
            AdapterError: it is of a weight of another shape, or no one weight says it.
        """
        if self.invocation:
            raise AdapterError(NO_WEIGHT)
        axes = 2 if self.rank is None and not self.makes_anew else None  # a kernel may follow
        (rows, *columns), (high, *wide) = self.shape[:axes], base.shape[:axes]
        same = None in columns or math.prod(n or 0 for n in columns) == math.prod(wide)
        if rows not in (None, high) or not same:
            if self.groups > 1:
                raise AdapterError("the update of a grouped convolution has no weight form")
            raise AdapterError(f"made for a weight {self.shape}, found {tuple(base.shape)}")
        return dense(self.of(constant(base)), self.wide(base.dtype)).reshape(base.shape)


def length(tensor: torch.Tensor) -> float:
    """The Frobenius norm of a tensor."""
    return float(torch.linalg.vector_norm(tensor.detach().double()))


@dataclass(frozen=True, eq=False)
class Update(AnyUpdate):
    """``W' = diag(row) (W + scale * up @ down) diag(col)`` and ``b' = b + scale * bias``.

    Shapes are those of a layer with ``W`` of (out, in), or (out, in, *kernel) for a convolution,
    whatever way the layer stores it: an embedding of (num, dim) is a layer with in = num and
    out = dim. Without row, magnitude and col it is plain LoRA.
    Source: Hu et al., LoRA, arXiv:2106.09685; rsLoRA's scale is of arXiv:2312.03732; DoRA's
    magnitude of arXiv:2402.09353.

    Attributes:
        down: (r, in) or (r, in, *kernel), in the dtype of the file.
        up: (out, r), in the dtype of the file, the scale not yet applied; (out, r / groups) beside
            a grouped convolution.
        scale: alpha / r, or alpha / sqrt(r) under rsLoRA.
        kind: what the file said: ``"lora"``, ``"rslora"``, ``"loha"``, ...
        bias: (out,), the bias of the up-projection (PEFT's ``lora_bias``), or None.
        magnitude: (out,), DoRA's: row is ``magnitude / norm(W + scale * up @ down)``, the norm
            over all axes but the first; computed when the update meets its layer.
        row: (out,), or None.
        col: (in,), or None.
        stored: what the file held, where that is not just down, up and the vectors.
        invocation: the tokens from whose last occurrence on it acts: aLoRA, arXiv:2504.12397.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    kind: str = "lora"
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    row: torch.Tensor | None = None
    col: torch.Tensor | None = None
    stored: SourceRecord | None = None
    invocation: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Checks that the factors belong together.

        Raises:
            AdapterError: they are no factors, their ranks differ, a vector is of another size, or
                the scale is no number of float64.
        """
        try:
            object.__setattr__(self, "scale", float(self.scale * 1.0))  # no text is one
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            told = f"Update.scale is {self.scale!r:.80}: expected float"
            raise AdapterError(told) from error
        shapes = f"down {tuple(self.down.shape)}, up {tuple(self.up.shape)}"
        if self.down.ndim < 2 or self.up.ndim != 2 or not self._ranks_agree():
            raise AdapterError(f"an update has {shapes}: expected down (r, in) and up (out, r)")
        out, into = self.up.shape[:1], self.down.shape[1:2]
        sizes = {"bias": out, "magnitude": out, "row": out, "col": into}
        for name, size in sizes.items():
            vector = getattr(self, name)
            if vector is not None and vector.shape != size:
                found = f"{name} {tuple(vector.shape)}"
                wanted = "(in,)" if name == "col" else "(out,)"
                raise AdapterError(f"an update has {shapes}, {found}: expected {name} {wanted}")
        if self.magnitude is not None and self.row is not None:
            raise AdapterError("an update has a magnitude and a row: the row is made of one")

    def _ranks_agree(self) -> bool:
        down, up = self.down.shape[0], self.up.shape[1]
        return down == up or (self.down.ndim > 2 and up > 0 and down % up == 0)

    @property
    def rank(self) -> int:  # type: ignore[override]
        """The inner dimension r."""
        return self.down.shape[0]

    @property
    def groups(self) -> int:  # type: ignore[override]
        """Of the up-projection: 1, but beside a grouped convolution."""
        return self.rank // self.up.shape[1] if self.rank else 1

    @property
    def alpha(self) -> float:
        """The alpha that gives this scale at this rank."""
        return self.scale * (self.rank**0.5 if self.kind == "rslora" else self.rank)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """(out, in, *kernel) of the layer that this update fits."""
        return self.up.shape[0], *self.down.shape[1:]

    @property
    def is_plain(self) -> bool:  # type: ignore[override]
        """Whether it is a product of two factors, and at most a bias: plain LoRA in effect."""
        return self.is_product and not self.invocation

    @property
    def is_product(self) -> bool:
        """Whether W' is W and a product of two factors, wherever it acts."""
        return self.magnitude is None and self.row is None and self.col is None

    def tensors(self) -> Iterator[torch.Tensor]:
        """The factors and the vectors that are there."""
        every = (self.down, self.up, self.bias, self.magnitude, self.row, self.col)
        return (tensor for tensor in every if tensor is not None)

    def of(self, weight: Matrix) -> Matrix:
        """W' of W, both (out, in * kernel), in of all groups beside a grouped convolution."""
        whole: Matrix = Sum(weight, self._product())
        row: Matrix | None = None if self.row is None else constant(self.row)
        if self.magnitude is not None:
            row = Quotient(constant(self.magnitude), RowNorm(whole))
        if self.col is not None:
            whole = columns_scaled(whole, constant(self.col))
        return whole if row is None else scaled(row, whole)

    def _product(self) -> Matrix:
        up, groups = self.up, self.groups
        left = diagonal(up.reshape(groups, -1, up.shape[1])) if groups > 1 else constant(up)
        return DiagMul(number(self.scale), product(left, constant(self.down)))

    def shift(self, own: Bias) -> torch.Tensor | None:
        """``scale * bias``, in float32 or wider, or None."""
        if self.bias is None:
            return None
        return self.bias.to(torch.promote_types(self.up.dtype, torch.float32)) * self.scale

    def with_magnitude(self, magnitude: torch.Tensor) -> Update:
        """The update with a magnitude, which is of (out,)."""
        return replace(self, magnitude=magnitude)

    def measures(self) -> dict[str, Any]:
        """``rank``, ``scale``, ``norm`` of ``scale * up @ down``, ``<vector>_norm``."""
        own = {"rank": self.rank, "scale": self.scale, "norm": self._norm()}
        return own | super().measures()

    def _norm(self) -> float:
        """The Frobenius norm of ``scale * up @ down``, without the product, which may be large.

        It is the root of the sum of ``(up.T @ up) * (down @ down.T)``; a grouped up-projection has
        one such product a group.
        """
        groups, rank = self.groups, self.up.shape[1]
        up = self.up.detach().double().reshape(groups, -1, rank)
        down = self.down.detach().double().reshape(groups, rank, -1)
        square = ((up.mT @ up) * (down @ down.mT)).sum().clamp_min(0)
        return abs(self.scale) * float(square.sqrt())

    def delta(self) -> torch.Tensor:
        """``scale * up @ down``, of (out, in, *kernel), in float32 or wider.

        Raises:
            AdapterError: the up-projection is grouped: no weight of this shape says the same.
        """
        if self.groups > 1:
            raise AdapterError("the update of a grouped convolution has no weight form")
        dtype = torch.promote_types(self.up.dtype, self.down.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return dense(self._product(), wide).reshape(self.shape)

    def factors(
        self, dtype: torch.dtype, row: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The factored form: what computes this update in a dtype without a scale of its own.

        The scale is folded in float32 or wider, so that each value is rounded to the dtype once.

        Args:
            dtype: of the result.
            row: (out,), a factor of every output of the product, or None.

        Returns:
            down (r, in, *kernel); up (out, r) with scale and row folded in; bias (out,) with the
            scale folded in, or None.
        """
        up = self.up.to(self.wide(dtype)) * self.scale
        up = up if row is None else up * row[:, None]
        bias = self.shift(lambda: None)
        return self.down.to(dtype), up.to(dtype), None if bias is None else bias.to(dtype)

    def to_rank(self, rank: int) -> tuple[Update, float]:
        """The nearest update of at most this rank; scale, bias and vectors stay as they are.

        The singular value decomposition of ``up @ down``, cut off, by way of the QR
        decompositions of the factors: nothing of size (out, in) is made. It is computed in
        float64, and the new factors are of float32 or wider, whatever the file's dtype.

        Returns:
            The update, itself if its rank is no higher, and the relative error: the Frobenius
            norm of what was cut off over that of ``up @ down``.

        Raises:
            AdapterError: DoRA's norm depends on the whole product; a grouped up is no factor.
        """
        if rank >= self.rank:
            return self, 0.0
        if self.magnitude is not None or self.groups > 1:
            kind = "DoRA" if self.magnitude is not None else "a grouped convolution"
            raise AdapterError(f"the rank of {kind} cannot be cut: another row would be scaled")
        svd = of_product(self.up.detach().double(), self.down.detach().double().flatten(1))
        found = cut(svd, rank, self.wide(torch.float32))
        kind = self.kind if self.stored is None else "lora"
        stored = kept(self.stored)
        down = found.down.reshape(-1, *self.down.shape[1:])
        return replace(self, up=found.up, down=down, kind=kind, stored=stored), found.error

    def has_effect(self) -> bool:
        """Whether any input could tell this update from none."""
        if not self.is_product:
            return True  # what a vector does is known beside its layer
        product = self.scale != 0 and bool(self.up.any()) and bool(self.down.any())
        return product or (self.bias is not None and self.scale != 0 and bool(self.bias.any()))

    def is_finite(self) -> bool:
        """Whether the scale and every value are finite numbers."""
        return math.isfinite(self.scale) and super().is_finite()


Update.__init__ = takes(AdapterError)(Update.__init__)  # type: ignore[method-assign]


def with_settings(update: U, **settings: object) -> U:
    """The update, its source record saying more."""
    stored = SourceRecord(update.stored_tensors, {**update.stored_settings, **settings})
    return replace(update, stored=stored)


def activated(update: Update, tokens: Sequence[int]) -> Update:
    """The update from the last of these tokens on; of none, as it is."""
    return replace(update, kind="alora", invocation=tuple(tokens)) if tokens else update
