"""Values that a layer's dtype cannot hold, or can hold and not compute with."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import fx

from lora_fx.adapters.updates import AnyUpdate
from lora_fx.errors import AdapterError
from lora_fx.graph.graph_module import attribute
from lora_fx.injection.branch_tensors import BranchTensors, canonical
from lora_fx.injection.match_branch import branches_of
from lora_fx.layers.layer import Layer
from lora_fx.layers.sites import sites


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
