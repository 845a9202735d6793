"""A layer's pair in loralib's layout, as an update."""

from __future__ import annotations

import math

import torch

from lora_fx.adapters.other_updates import AnyUpdate, WeightUpdate, added
from lora_fx.adapters.scaling import checked_rank
from lora_fx.adapters.source_record import EMBEDDING, SourceRecord
from lora_fx.adapters.updates import Update
from lora_fx.errors import AdapterError, within
from lora_fx.formats.hints import Hints
from lora_fx.formats.layer_tensors import Roles, matrices_of
from lora_fx.formats.loralib.merged_linear import block_diagonal, groups_of

Shape = tuple[int, ...]
LEAVES = frozenset({"lora_A", "lora_B"})


def update_of(
    path: str,
    roles: Roles,
    layer: Shape | None,
    alpha: float,
    hints: Hints,
    is_table: bool = False,
) -> AnyUpdate:
    """The update of one layer: ``W + alpha / r * (lora_B @ lora_A)``, viewed as W is.

    Args:
        path: of the layer.
        roles: its pair.
        layer: (out, in / groups, *kernel), or None if unknown, and then no convolution.
        alpha: of the layer.
        hints: ``r`` and ``enable_lora`` are heeded.
        is_table: whether it is known to be an embedding, which other formats name otherwise.

    Raises:
        AdapterError: the shapes are not of the layer, or a hint contradicts them.
    """
    down, up = matrices_of(roles)
    kernel = () if layer is None else layer[2:]
    size = kernel[0] if kernel else 1
    rank, rest = divmod(up.shape[1], size)
    with within(f"{path}: lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)}"):
        if rest or not rank:
            raise AdapterError(f"the layer's kernel is {kernel}, expected r * {size} ranks")
        if hints.r is not None and checked_rank("r", hints.r) != rank:
            raise AdapterError(
                f"of rank {rank}, the hint r is {hints.r}; a convolution's matrices have "
                "r times its kernel's size: pass base= if it is one"
            )
        settings = {"alpha": alpha, "r": rank, "scale": alpha / rank}
        if layer is not None and kernel:
            return _conv(down, up, layer, settings)
        groups = groups_of(path, down, up, hints, None if layer is None else layer[0])
    if groups is None:
        table = EMBEDDING if is_table else None
        return Update(down, up, alpha / rank, stored=table)
    stored = SourceRecord({"lora_A": down, "lora_B": up}, settings | {"enable_lora": list(groups)})
    return Update(down, block_diagonal(up, groups), alpha / rank, "fused", stored=stored)


def _conv(
    down: torch.Tensor, up: torch.Tensor, layer: Shape, settings: dict[str, float]
) -> AnyUpdate:
    """The update of a convolution, which loralib reads off a matrix of (out * k, in * k).

    Source: ``ConvLoRA`` of loralib 0.1.2. Its product is viewed as the weight, so k numbers of an
    output stand below each other, and the rank of the weight is up to r k². Without groups it is
    a product of two factors still, which pays where that is less than half of the inputs.
    """
    out, into, *kernel = layer
    size, cells, rank = kernel[0], math.prod(kernel), len(down)
    if len(set(kernel)) > 1 or rank != up.shape[1] or len(up) * down.shape[1] != math.prod(layer):
        raise AdapterError(
            f"no pair of a convolution {layer}: expected (r * k, in * k) and "
            "(out / groups * k, r * k), whose product has as many numbers as the weight"
        )
    scale, stored = settings["scale"], SourceRecord({"lora_A": down, "lora_B": up}, settings)
    is_one_group = len(up) == out * size
    simple = _of_points(up, size) if is_one_group else None
    if simple is not None:
        return Update(down.reshape(-1, into, *kernel), simple, scale, stored=stored)
    if is_one_group and 2 * rank * size < into * cells:
        eye = torch.eye(size, dtype=down.dtype, device=down.device)
        wide = torch.kron(eye, down).reshape(-1, into, *kernel)
        return Update(wide, up.reshape(out, -1), scale, stored=stored)
    dtype = torch.promote_types(torch.promote_types(up.dtype, down.dtype), torch.float32)
    delta = scale * (up.to(dtype) @ down.to(dtype)).reshape(layer)
    return WeightUpdate("dense", added(delta), layer, stored)


def _of_points(up: torch.Tensor, size: int) -> torch.Tensor | None:
    """The u of ``kron(u, I)``, if this is such a matrix: what one point says of all of them."""
    parts = up.reshape(len(up) // size, size, -1, size)
    found = parts[:, 0, :, 0]
    whole = torch.kron(found.contiguous(), torch.eye(size, dtype=up.dtype, device=up.device))
    return found.contiguous() if torch.equal(whole, up) else None


def as_points(up: torch.Tensor, size: int) -> torch.Tensor:
    """An up-projection (out, r) as loralib stores a convolution's: (out * k, r * k)."""
    return torch.kron(up.contiguous(), torch.eye(size, dtype=up.dtype, device=up.device))
