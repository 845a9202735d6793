"""The tensors of a branch, for a known weight: down, up, gain, bias and column factors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from math import prod

import torch

from lora_fx.adapters.source_record import EMBEDDING
from lora_fx.adapters.updates import AnyUpdate, Bias, Update
from lora_fx.algebra.evaluate import dense
from lora_fx.algebra.low_rank import beside
from lora_fx.algebra.matrix_expr import Leaf
from lora_fx.layers.layer import Layer


@dataclass(frozen=True, eq=False)
class BranchTensors:
    """``base(col x) + (col x) A B + gain (base(col x) - b) + bias``, b the layer's own bias.

    A row of ``diag(row) (W + up @ down)`` is a gain of row - 1, and is folded into B: so the base
    layer stays as it is, and what several adapters add to it can be summed.

    Attributes:
        down: as the layer's shrink reads it, such as (in, r), or None.
        up: as the layer's expand reads it, such as (r, out), every scale folded in, or None.
        gain: (out,), broadcast over what follows in a convolution, or None.
        bias: (out,), likewise.
        col: (in,), likewise.
    """

    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    col: torch.Tensor | None = None

    def each(self) -> dict[str, torch.Tensor]:
        """The tensors that are there, by the names above."""
        every = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in every.items() if tensor is not None}


def branch_tensors(
    update: AnyUpdate, site: Layer, weight: Callable[[], torch.Tensor], bias: Bias
) -> BranchTensors:
    """What of an update is beside a layer: in float32 or wider, rounded once to its dtype.

    Args:
        update: fits the layer.
        site: the layer.
        weight: gives that of the layer, as it stores it; asked for DoRA's norm alone.
        bias: gives (out,) of the layer, or None; asked for where it is scaled.
    """
    store, added = partial(site.type.store, "vector"), update.shift(bias)
    shift = None if added is None else store(added.to(site.dtype))
    if update.makes_anew:
        return BranchTensors(bias=shift)
    out, *rest = site.shape
    base = Leaf((out, prod(rest)), "base", lambda: canonical(site, weight()))
    found, wide = beside(base, update.of(base)), update.wide(site.dtype)
    row = None if found.row is None else dense(found.row, wide)[:, 0]
    terms = BranchTensors(
        gain=None if row is None else store((row - 1).to(site.dtype)),
        bias=shift,
        col=None if found.col is None else store(dense(found.col, wide)[:, 0].to(site.dtype)),
    )
    if not isinstance(update, Update) or not update.rank:
        return terms
    down, up, _ = update.factors(site.dtype, row)
    down, up = site.type.store("down", down), site.type.store("up", up)
    return replace(terms, down=down.contiguous(), up=up.contiguous())


def canonical(site: Layer, weight: torch.Tensor) -> torch.Tensor:
    """A layer's weight as (out, in / groups, *kernel), a view unless it has groups."""
    return site.type.canonical("weight", weight.detach(), site.groups)


def update_of(terms: BranchTensors, site: Layer, scale: float = 1.0) -> Update:
    """The reverse of `branch_tensors`: rows and columns for gains, factors as updates hold them.

    Args:
        terms: of one layer.
        site: the layer.
        scale: a factor that is not folded into ``up``.
    """
    row = None if terms.gain is None else terms.gain.flatten() + 1
    out, into, *kernel = site.shape
    down, up = (
        torch.zeros(0, into, *kernel, dtype=site.dtype),
        torch.zeros(out, 0, dtype=site.dtype),
    )
    if terms.down is not None and terms.up is not None:
        down, up = (
            site.type.canonical("down", terms.down).contiguous(),
            site.type.canonical("up", terms.up).contiguous(),
        )
    if row is not None:  # it was folded into up
        up = torch.where(row[:, None] == 0, 0.0, up / row[:, None])
    return Update(
        down,
        up,
        scale,
        bias=None if terms.bias is None else terms.bias.flatten() / scale,
        row=row,
        col=None if terms.col is None else terms.col.flatten(),
        stored=EMBEDDING if site.type.reads_ids else None,
    )
