"""loralib's own layers: several outputs adapted each apart, and convolutions stored as a matrix."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any

import torch

from lora_fx.adapters.other_updates import AnyUpdate, WeightUpdate, added
from lora_fx.adapters.source_record import SourceRecord
from lora_fx.adapters.updates import Update
from lora_fx.errors import AdapterError

Sizes = tuple[int, ...]
Groups = tuple[bool, ...]  # of a MergedLinear, a matrix of several outputs: which are adapted
LEAVES = frozenset({"lora_A", "lora_B"})
_OUTPUTS = 64  # of one fused layer; attention has three
_LITGPT = re.compile(r"(^|\.)h\.\d+\.attn\.(qkv|attn)$")


def checked_groups(value: object) -> Groups:
    """Returns an ``enable_lora``, or refuses what is not a list of bools, one of them True."""
    is_list = isinstance(value, Sequence) and all(type(item) is bool for item in value)
    if not isinstance(value, Sequence) or not is_list or not any(value):
        raise AdapterError(f"enable_lora is {value!r:.80}, expected a list of bools, one True")
    if len(value) > _OUTPUTS:  # each has its rows in memory, adapted or not
        raise AdapterError(f"enable_lora is of {len(value)} outputs, expected at most {_OUTPUTS}")
    return tuple(value)


def sizes_of(path: str, down: torch.Tensor, up: torch.Tensor, base: Any) -> Sizes | None:
    """How many rows each output of a fused layer of litgpt has; None where all are of one size.

    Its queries have more rows than its keys and values where heads share these, which its model's
    config says, and no tensor; ``attn.attn`` of older versions has the rows of each head apart.
    Source: ``LoRAQKVLinear`` of litgpt 0.5.

    Raises:
        AdapterError: nobody knows which rows an output has.
    """
    config, found = getattr(base, "config", None), _LITGPT.search(path)
    names = "n_head", "n_query_groups", "head_size"
    heads, groups, size = (getattr(config, name, None) for name in names)
    is_of_today = found is not None and found[2] == "qkv"
    if found is None or (is_of_today and heads is not None and heads == groups):
        return None
    if is_of_today and isinstance(heads, int) and isinstance(groups, int) and isinstance(size, int):
        return heads * size, groups * size, groups * size
    if len(down) == up.shape[1]:
        return None
    raise AdapterError(
        f"of litgpt, of {heads or 'unknown'} heads in {groups or 'unknown'} groups: its outputs "
        "may be of several sizes, expected loralib's of one: pass base=, litgpt's own model of "
        "today; else merge it with litgpt merge_lora, and trace the result"
    )


def block_diagonal(up: torch.Tensor, groups: Groups, sizes: Sizes | None = None) -> torch.Tensor:
    """The up-projection of all outputs at once, for a down-projection that stacks their ranks.

    Output g is ``up[g] @ down[g]``, so each block meets its own ranks alone, and an output that is
    not adapted is zero. Source: ``MergedLinear.merge_AB`` of loralib 0.1.2.

    Args:
        up: (size * adapted, r).
        groups: which outputs are adapted.
        sizes: how many rows each output has, adapted or not; without, all have as many.

    Returns:
        (size * outputs, r * adapted): the same values, and zeros.

    Raises:
        AdapterError: the outputs have other rows than up.
    """
    rows = sizes or (len(up) // sum(groups),) * len(groups)
    own = list(compress(rows, groups))
    if len(rows) != len(groups) or sum(own) != len(up):
        raise AdapterError(
            f"enable_lora={list(groups)} of outputs of {list(rows)} rows, but up has {len(up)}: "
            "pass enable_lora= as its model has it"
        )
    left = iter(torch.split(up, own))
    each = (next(left) if on else up.new_zeros(n, 0) for on, n in zip(groups, rows, strict=True))
    whole: torch.Tensor = torch.block_diag(*each)  # type: ignore[no-untyped-call]
    return whole


def fused(
    down: torch.Tensor,
    up: torch.Tensor,
    groups: Groups,
    settings: Mapping[str, Any],
    sizes: Sizes | None = None,
) -> Update:
    """Reads ``MergedLinear``'s pair as one product, with zeros where nothing is adapted."""
    stored = SourceRecord(pair(down, up), {**settings, "enable_lora": list(groups)})
    return Update(
        down, block_diagonal(up, groups, sizes), settings["scale"], "fused", stored=stored
    )


def pair(down: torch.Tensor, up: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a layer by their leaves."""
    return {"lora_A": down, "lora_B": up}


def convolution(
    down: torch.Tensor, up: torch.Tensor, layer: tuple[int, ...], settings: Mapping[str, Any]
) -> AnyUpdate:
    """Reads a convolution's pair, whose product loralib reads as a matrix of (out * k, in * k).

    Source: ``ConvLoRA`` of loralib 0.1.2. Its product is viewed as the weight, so k numbers of an
    output stand below each other, and the rank of the weight is up to r k². Without groups it is
    a product of two factors still, which pays where that is less than half of the inputs.

    Args:
        down: (r * k, in * k).
        up: (out / groups * k, r * k).
        layer: (out, in / groups, *kernel).
        settings: ``scale``, and what is kept beside it.

    Raises:
        AdapterError: the product is not viewed as this weight.
    """
    out, into, *kernel = layer
    size, cells, rank = kernel[0], math.prod(kernel), len(down)
    if len(set(kernel)) > 1 or rank != up.shape[1] or len(up) * down.shape[1] != math.prod(layer):
        raise AdapterError(
            f"no pair of a convolution {layer}: expected (r * k, in * k) and "
            "(out / groups * k, r * k), whose product has as many numbers as the weight"
        )
    scale, stored = settings["scale"], SourceRecord(pair(down, up), settings)
    is_one_group = len(up) == out * size
    simple = _of_points(up, size) if is_one_group else None
    if simple is not None:
        return Update(down.reshape(-1, into, *kernel), simple, scale, stored=stored)
    if is_one_group and 2 * rank * size < into * cells:
        eye = torch.eye(size, dtype=down.dtype, device=down.device)
        whole = torch.kron(eye, down).reshape(-1, into, *kernel)
        return Update(whole, up.reshape(out, -1), scale, stored=stored)
    dtype = torch.promote_types(torch.promote_types(up.dtype, down.dtype), torch.float32)
    delta = scale * (up.to(dtype) @ down.to(dtype)).reshape(layer)
    return WeightUpdate("dense", added(delta), layer, stored)


def _of_points(up: torch.Tensor, size: int) -> torch.Tensor | None:
    """The u of ``kron(u, I)``, if this is such a matrix: what one point says of all of them."""
    parts = up.reshape(len(up) // size, size, -1, size)
    found = parts[:, 0, :, 0].contiguous()
    return found if torch.equal(as_points(found, size), up) else None


def as_points(up: torch.Tensor, size: int) -> torch.Tensor:
    """An up-projection (out, r) as loralib stores a convolution's: (out * k, r * k)."""
    return torch.kron(up.contiguous(), torch.eye(size, dtype=up.dtype, device=up.device))
