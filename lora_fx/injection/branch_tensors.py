"""The tensors of a branch, for a known weight: down, up, gain, bias and column factors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from lora_fx.adapters.other_updates import Scaling
from lora_fx.adapters.source_record import EMBEDDING
from lora_fx.adapters.updates import Update
from lora_fx.layers.layer import Layer


@dataclass(frozen=True, eq=False)
class Terms:
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


def bias_alone(bias: torch.Tensor, site: Layer) -> Terms:
    """What is added to every result, (out,), and nothing else."""
    return Terms(bias=site.type.store("vector", bias.to(site.dtype)))


def terms_of(
    update: Update | Scaling,
    site: Layer,
    weight: Callable[[], torch.Tensor],
    bias: torch.Tensor | None,
) -> Terms:
    """An update beside a layer: computed in float32 or wider, rounded once to its dtype.

    Args:
        update: fits the layer.
        site: the layer.
        weight: gives that of the layer, as it stores it; asked for DoRA's norm alone.
        bias: (out,) of the layer, or None.
    """
    if isinstance(update, Scaling):
        return _scaled(update, site, bias)
    wide = torch.promote_types(site.dtype, torch.float32)
    row = None if update.row is None else update.row.to(wide)
    if update.magnitude is not None:
        row = update.row_for(canonical(site, weight()))
    down, up, added = update.factors(site.dtype, row)
    store = site.type.store
    return Terms(
        store("down", down).contiguous() if update.rank else None,
        store("up", up).contiguous() if update.rank else None,
        None if row is None else store("vector", (row - 1).to(site.dtype)),
        None if added is None else store("vector", added),
        None if update.col is None else store("vector", update.col.to(site.dtype)),
    )


def _scaled(update: Scaling, site: Layer, bias: torch.Tensor | None) -> Terms:
    """(IA)3 scales the results, the bias among them, or what comes in."""
    wide = torch.promote_types(site.dtype, torch.float32)
    if update.row is None:
        assert update.col is not None
        return Terms(col=site.type.store("vector", update.col.to(site.dtype)))
    gain = update.row.to(wide) - 1
    added = None if bias is None else (gain * bias.to(wide)).to(site.dtype)
    return Terms(
        gain=site.type.store("vector", gain.to(site.dtype)),
        bias=None if added is None else site.type.store("vector", added),
    )


def canonical(site: Layer, weight: torch.Tensor) -> torch.Tensor:
    """A layer's weight as (out, in / groups, *kernel), a view unless it has groups."""
    return site.type.canonical("weight", weight.detach(), site.groups)


def update_of(terms: Terms, site: Layer, scale: float = 1.0) -> Update:
    """The reverse of `terms_of`: rows and columns in place of gains, factors as updates hold them.

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
