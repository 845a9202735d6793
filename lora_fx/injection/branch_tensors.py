"""The tensors of a branch, for a known weight, and whether the dtype of the layer holds them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from math import prod

import torch
from torch import fx

from lora_fx.adapters.source_record import EMBEDDING
from lora_fx.adapters.updates import AnyUpdate, Bias, Update
from lora_fx.algebra.evaluate import dense
from lora_fx.algebra.low_rank import beside
from lora_fx.algebra.matrix_expr import Leaf
from lora_fx.errors import AdapterError
from lora_fx.graph.graph_module import attribute
from lora_fx.injection.branches import branches_of
from lora_fx.layers.layer import Layer
from lora_fx.layers.sites import sites


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
    kind, added = site.type, update.shift(bias)
    store = partial(kind.store, "vector")
    shift = None if added is None else store(added.to(site.dtype))
    if update.makes_anew:
        return BranchTensors(bias=shift)
    row, col = (None, None) if update.is_plain else _row_and_col(update, site, weight)
    terms = BranchTensors(
        gain=None if row is None else store((row - 1).to(site.dtype)),
        bias=shift,
        col=None if col is None else store(col.to(site.dtype)),
    )
    if not isinstance(update, Update) or not update.rank:
        return terms
    down, up, _ = update.factors(site.dtype, row)
    down, up = kind.store("down", down), kind.store("up", up)
    return replace(terms, down=down.contiguous(), up=up.contiguous())


def _row_and_col(
    update: AnyUpdate, site: Layer, weight: Callable[[], torch.Tensor]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(out,) and (in,) of ``W' = diag(row) (W + ...) diag(col)``, None where all are ones."""
    out, *rest = site.shape
    base = Leaf((out, prod(rest)), "base", lambda: canonical(site, weight()))
    found, wide = beside(base, update.of(base)), update.wide(site.dtype)
    row, col = (m if m is None else dense(m, wide)[:, 0] for m in (found.row, found.col))
    return row, col


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


def check_finite(
    site: Layer,
    name: str,
    update: AnyUpdate,
    terms: BranchTensors,
    weight: Callable[[], torch.Tensor],
) -> None:
    """Refuses values that no layer of this dtype can hold.

    A product of down and up may be too large for a branch and fit the layer once it is merged:
    `check_product` is for those who keep it beside.

    Args:
        site: the layer.
        name: of the adapter.
        update: what it does to the layer.
        terms: what that becomes beside the layer.
        weight: gives the layer's, as it is stored; asked for only if something is very large.

    Raises:
        AdapterError: the adapter holds NaN or infinity, or its values overflow the dtype.
    """
    if not update.is_finite():
        raise AdapterError(f"{site.path}: adapter {name} holds NaN or infinity; save it again")
    loud = [key for key, tensor in terms.each().items() if not tensor.isfinite().all()]
    if loud:
        reason = "DoRA's norm of a row is zero, or " if terms.gain is not None else ""
        raise AdapterError(
            f"{site.path}: adapter {name}: {reason}values overflow {site.dtype}, the dtype of the "
            f"layer, in {', '.join(loud)}; load the model in a wider dtype"
        )
    if update.makes_anew:
        _refuse(site, name, _made_anew(site, update, weight))
    else:
        _refuse(site, name, _scaled(site, terms, weight))


def check_product(site: Layer, name: str, terms: BranchTensors) -> None:
    """Refuses a low-rank part that overflows the dtype of its layer when it is run beside it.

    Raises:
        AdapterError: names the layer and the adapter.
    """
    _refuse(site, name, overflow(site, terms))


def _refuse(site: Layer, name: str, what: str) -> None:
    if what:
        raise AdapterError(
            f"{site.path}: adapter {name}: its values are finite, but {what} overflows "
            f"{site.dtype}, the dtype of the layer; load the model in a wider dtype"
        )


def overflow(site: Layer, terms: BranchTensors) -> str:
    """What of a low-rank part overflows for inputs of size one, or ``""``.

    A bound, of sums in any order: no product of the size of the weight is made.
    """
    if terms.down is None or terms.up is None:
        return ""
    limit = torch.finfo(site.dtype).max
    down = site.type.canonical("down", terms.down).double()
    if terms.col is not None:
        down = down * terms.col.double().reshape(1, -1, *[1] * (down.ndim - 2))
    up, reach = site.type.canonical("up", terms.up).double().abs(), _sizes(site, down)
    if not reach.numel():
        return ""
    groups = max(1, len(reach) // max(1, up.shape[1]))  # of the up beside a grouped convolution
    sums = up.reshape(groups, -1, up.shape[1]) @ reach.reshape(groups, -1, 1)
    if float(reach.max()) > limit:
        return "what down gives of an input of size one"
    return "the product of down and up" if float(sums.max()) > limit else ""


def _sizes(site: Layer, rows: torch.Tensor) -> torch.Tensor:
    """The largest that each row gives for inputs of size one; a lookup gives one of its values."""
    flat = rows.flatten(1).double()
    return flat.abs().amax(1) if site.type.reads_ids else torch.linalg.vector_norm(flat, dim=1)


def _scaled(site: Layer, terms: BranchTensors, weight: Callable[[], torch.Tensor]) -> str:
    limit = torch.finfo(site.dtype).max
    vectors = {"gain": terms.gain, "col": terms.col}
    for name, vector in vectors.items():
        if vector is None or float(vector.abs().max()) < math.sqrt(limit):
            continue
        base, factor = canonical(site, weight()).double(), vector.double().flatten()
        axis = 0 if name == "gain" else 1
        rows = base * factor.reshape([-1 if a == axis else 1 for a in range(base.ndim)])
        if float(_sizes(site, rows).max()) > limit:
            return f"its {name} times the weight"
    return ""


def _made_anew(site: Layer, update: AnyUpdate, weight: Callable[[], torch.Tensor]) -> str:
    """The weight is made to see it, if the values are such that their products may be large."""
    limit = torch.finfo(site.dtype).max
    sizes = [float(v.abs().max()) for v in update.values if v.is_floating_point() and v.numel()]
    if math.prod(max(1.0, size) for size in sizes) < math.sqrt(limit):
        return ""
    made = update.weight(canonical(site, weight()))
    return "" if bool(made.to(site.dtype).isfinite().all()) else "the weight that it makes"


def check_branches(gm: fx.GraphModule) -> None:
    """Refuses a graph whose branches hold, or would give, what is not finite.

    Raises:
        AdapterError: names the layer and the adapter.
    """
    for site in sites(gm):
        for branch in branches_of(site):
            nodes = (branch.down, branch.up, branch.gain, branch.bias, branch.col)
            found = [None if n is None else attribute(gm, str(n.target)).detach() for n in nodes]
            terms = BranchTensors(*found)
            loud = [part for part, value in terms.each().items() if not value.isfinite().all()]
            what = f"NaN or infinity in {', '.join(loud)}" if loud else overflow(site, terms)
            if what:
                raise AdapterError(
                    f"{site.path}: adapter {branch.name}: {what}: not finite in {site.dtype}; "
                    "train it again, or load the model in a wider dtype"
                )
