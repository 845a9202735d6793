"""What an adapter is: one low-rank update a layer, as plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch

from lora_fx.errors import AdapterError, shorten

if TYPE_CHECKING:
    from lora_fx.targets import TargetRule


@dataclass(frozen=True, eq=False)
class Update:
    """The update of one layer: ``W' = W + scale * up @ down`` and ``b' = b + scale * bias``.

    Shapes are those of a linear layer with ``W`` of (out, in), whatever way the layer stores it.
    Source: Hu et al., LoRA, arXiv:2106.09685; rsLoRA's scale is of arXiv:2312.03732.

    Attributes:
        down: (r, in), in the dtype of the file.
        up: (out, r), in the dtype of the file, the scale not yet applied.
        scale: alpha / r, or alpha / sqrt(r) under rsLoRA.
        kind: ``"lora"`` or ``"rslora"``: what the scale was made of.
        bias: (out,), the bias of the up-projection (PEFT's ``lora_bias``), or None.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    kind: str = "lora"
    bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Checks that the factors belong together.

        Raises:
            AdapterError: they are no matrices, their ranks differ, or the bias is of another size.
        """
        shapes = f"down {tuple(self.down.shape)}, up {tuple(self.up.shape)}"
        if self.down.ndim != 2 or self.up.ndim != 2 or self.down.shape[0] != self.up.shape[1]:
            raise AdapterError(f"an update has {shapes}: expected down (r, in) and up (out, r)")
        if self.bias is not None and self.bias.shape != self.up.shape[:1]:
            raise AdapterError(
                f"an update has {shapes}, bias {tuple(self.bias.shape)}: expected bias (out,)"
            )

    @property
    def rank(self) -> int:
        """The inner dimension r."""
        return self.down.shape[0]

    @property
    def alpha(self) -> float:
        """The alpha that gives this scale at this rank."""
        return self.scale * (self.rank**0.5 if self.kind == "rslora" else self.rank)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the layer that this update fits."""
        return self.up.shape[0], self.down.shape[1]

    def delta(self) -> torch.Tensor:
        """The weight form: what is added to ``W``, (out, in), in float32 or wider."""
        dtype = torch.promote_types(self.up.dtype, self.down.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return self.scale * (self.up.to(wide) @ self.down.to(wide))

    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The factored form: what computes this update in a dtype without a scale of its own.

        The scale is folded in float32 or wider, so that each value is rounded to the dtype once.

        Returns:
            down (r, in); up (out, r) and bias (out,), or None, with the scale folded in.
        """
        wide = torch.promote_types(self.up.dtype, torch.float32)
        up = (self.up.to(wide) * self.scale).to(dtype)
        bias = None if self.bias is None else (self.bias.to(wide) * self.scale).to(dtype)
        return self.down.to(dtype), up, bias

    def to_rank(self, rank: int) -> tuple[Update, float]:
        """The nearest update of at most this rank; scale and bias stay as they are.

        The singular value decomposition of ``up @ down``, cut off, by way of the QR
        decompositions of the factors: nothing of size (out, in) is made. It is computed in
        float64, and the new factors are of float32 or wider, whatever the file's dtype.

        Returns:
            The update, itself if its rank is no higher, and the relative error: the Frobenius
            norm of what was cut off over that of ``up @ down``.
        """
        if rank >= self.rank:
            return self, 0.0
        up, down = (factor.detach().double() for factor in (self.up, self.down.T))
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
        return replace(self, up=new_up, down=new_down), error

    def has_effect(self) -> bool:
        """Whether any input could tell this update from none."""
        product = self.scale != 0 and bool(self.up.any()) and bool(self.down.any())
        return product or (self.bias is not None and self.scale != 0 and bool(self.bias.any()))

    def is_finite(self) -> bool:
        """Whether the scale and every value are finite numbers."""
        tensors = [self.down, self.up] + ([] if self.bias is None else [self.bias])
        return math.isfinite(self.scale) and all(bool(t.isfinite().all()) for t in tensors)


@dataclass(frozen=True, eq=False)
class Adapter:
    """An immutable set of updates, by the path of the module that each acts on.

    Attributes:
        name: tells adapters apart in one graph.
        updates: module path -> Update.
        replacements: parameter path (``classifier.weight``) -> full tensor that takes its place
            (PEFT's ``modules_to_save`` and trained biases).
        expects: which modules the adapter's config says it adapts; checked when it meets a model.
    """

    name: str
    updates: Mapping[str, Update]
    replacements: Mapping[str, torch.Tensor] = field(default_factory=dict)
    expects: TargetRule | None = None

    def __post_init__(self) -> None:
        """Checks the name and closes the mappings: an adapter is a value.

        Raises:
            AdapterError: the name could not be part of a parameter's name.
        """
        check_name(self.name)
        object.__setattr__(self, "updates", MappingProxyType(dict(self.updates)))
        object.__setattr__(self, "replacements", MappingProxyType(dict(self.replacements)))

    def to_rank(self, rank: int) -> Reduced:
        """The nearest adapter whose updates have at most this rank, and how near it is.

        Each layer by itself, as `Update.to_rank` says. Updates of this rank or less stay as they
        are, and so do the replacements.

        Args:
            rank: the highest rank to leave.

        Returns:
            The adapter, of the same name, and the relative error of each layer.

        Raises:
            AdapterError: the rank is no positive integer, or an update holds NaN or infinity.
        """
        if type(rank) is not int or rank < 1:
            raise AdapterError(f"rank is {rank!r:.80}, expected a positive integer")
        damaged = [path for path, update in self.updates.items() if not update.is_finite()]
        if damaged:
            raise AdapterError(
                f"adapter {self.name}: NaN or infinity in {shorten(damaged)}; save it again"
            )
        reduced = {path: update.to_rank(rank) for path, update in self.updates.items()}
        adapter = replace(self, updates={path: update for path, (update, _) in reduced.items()})
        return Reduced(adapter, {path: error for path, (_, error) in reduced.items()})

    def __str__(self) -> str:
        """One line a target: path, kind, shape, rank, scale."""
        lines = [f"adapter {self.name}: {len(self.updates)} targets"]
        lines += [
            f"  {path}  {u.kind}  {u.shape[1]} -> {u.shape[0]}  rank {u.rank}  scale {u.scale:g}"
            for path, u in self.updates.items()
        ]
        lines += [f"  {path}  replaced  {tuple(t.shape)}" for path, t in self.replacements.items()]
        return "\n".join(lines)

    __repr__ = __str__


class Reduced(NamedTuple):
    """What `Adapter.to_rank` gives.

    Attributes:
        adapter: the adapter of lower rank.
        errors: module path -> Frobenius norm of what was cut off over that of the whole update;
            0 where nothing was.
    """

    adapter: Adapter
    errors: Mapping[str, float]


def check_name(name: object) -> None:
    """Refuses an adapter name that could not be a segment of a parameter's name."""
    if not isinstance(name, str) or not name.isascii() or not name.isidentifier():
        raise AdapterError(
            f"the adapter's name is {name!r}, expected letters, digits and underscores, "
            "not starting with a digit: it becomes part of parameter names"
        )
