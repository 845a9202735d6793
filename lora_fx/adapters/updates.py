"""The low-rank update of one layer: down, up, scale, and vectors beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from lora_fx.adapters.source_record import Stored, kept
from lora_fx.errors import AdapterError

Shape = tuple[int | None, ...]


@dataclass(frozen=True, eq=False)
class Update:
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
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    kind: str = "lora"
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    row: torch.Tensor | None = None
    col: torch.Tensor | None = None
    stored: Stored | None = None

    def __post_init__(self) -> None:
        """Checks that the factors belong together.

        Raises:
            AdapterError: they are no factors, their ranks differ, or a vector is of another size.
        """
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
    def rank(self) -> int:
        """The inner dimension r."""
        return self.down.shape[0]

    @property
    def groups(self) -> int:
        """Of the up-projection: 1, but beside a grouped convolution."""
        return self.rank // self.up.shape[1] if self.rank else 1

    @property
    def alpha(self) -> float:
        """The alpha that gives this scale at this rank."""
        return self.scale * (self.rank**0.5 if self.kind == "rslora" else self.rank)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, *kernel) of the layer that this update fits."""
        return self.up.shape[0], *self.down.shape[1:]

    @property
    def is_plain(self) -> bool:
        """Whether it is a product of two factors, and at most a bias: plain LoRA in effect."""
        return self.magnitude is None and self.row is None and self.col is None

    def tensors(self) -> Iterator[torch.Tensor]:
        """The factors and the vectors that are there."""
        every = (self.down, self.up, self.bias, self.magnitude, self.row, self.col)
        return (tensor for tensor in every if tensor is not None)

    def delta(self) -> torch.Tensor:
        """``scale * up @ down``, of (out, in, *kernel), in float32 or wider.

        Raises:
            AdapterError: the up-projection is grouped: no weight of this shape says the same.
        """
        if self.groups > 1:
            raise AdapterError("the update of a grouped convolution has no weight form")
        dtype = torch.promote_types(self.up.dtype, self.down.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        product = self.up.to(wide) @ self.down.to(wide).flatten(1)
        delta: torch.Tensor = self.scale * product
        return delta.reshape(self.shape)

    def row_for(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The factor of every output: row, or DoRA's magnitude over the norm it is relative to.

        Args:
            weight: the layer's, (out, in, *kernel).

        Returns:
            (out,) in float32 or wider, or None.
        """
        wide = torch.promote_types(weight.dtype, torch.float32)
        if self.magnitude is None:
            return None if self.row is None else self.row.to(wide)
        whole = (weight.to(wide) + self.delta()).flatten(1)
        norm: torch.Tensor = torch.linalg.vector_norm(whole, dim=1)
        return self.magnitude.to(whole.dtype) / norm

    def weight(self, base: torch.Tensor) -> torch.Tensor:
        """The weight form: W -> W', both (out, in, *kernel), in float32 or wider."""
        wide = torch.promote_types(base.dtype, torch.float32)
        whole, row = base.to(wide) + self.delta(), self.row_for(base)
        if self.col is not None:
            whole = whole * _along(self.col.to(wide), whole, 1)
        return whole if row is None else whole * _along(row, whole, 0)

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
        wide = torch.promote_types(self.up.dtype, torch.float32)
        up = self.up.to(wide) * self.scale
        up = up if row is None else up * row[:, None]
        bias = None if self.bias is None else (self.bias.to(wide) * self.scale).to(dtype)
        return self.down.to(dtype), up.to(dtype), bias

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
        up, down = self.up.detach().double(), self.down.detach().double().flatten(1).T
        (left, above), (right, below) = torch.linalg.qr(up), torch.linalg.qr(down)
        rows, values, columns = torch.linalg.svd(above @ below.T, full_matrices=False)
        # Half of each singular value on either side, so that neither factor leaves a half's range.
        root = values[:rank].sqrt()
        wide = torch.promote_types(
            torch.promote_types(self.up.dtype, self.down.dtype), torch.float32
        )
        new_up = (left @ (rows[:, :rank] * root)).to(wide)
        new_down = ((columns[:rank].T * root).T @ right.T).to(wide)
        size = float(values.norm())
        error = float(values[rank:].norm()) / size if size > 0 else 0.0
        kind = self.kind if self.stored is None else "lora"
        stored = kept(self.stored)
        new_down = new_down.reshape(-1, *self.down.shape[1:])
        return replace(self, up=new_up, down=new_down, kind=kind, stored=stored), error

    def has_effect(self) -> bool:
        """Whether any input could tell this update from none."""
        if not self.is_plain:
            return True  # what a vector does is known beside its layer
        product = self.scale != 0 and bool(self.up.any()) and bool(self.down.any())
        return product or (self.bias is not None and self.scale != 0 and bool(self.bias.any()))

    def is_finite(self) -> bool:
        """Whether the scale and every value are finite numbers."""
        return math.isfinite(self.scale) and all(bool(t.isfinite().all()) for t in self.tensors())


def _along(vector: torch.Tensor, weight: torch.Tensor, axis: int) -> torch.Tensor:
    """A vector that multiplies one axis of a weight."""
    return vector.reshape([-1 if a == axis else 1 for a in range(weight.ndim)])
