"""Adapters that start as a part of the base weight, and so change the base."""

from __future__ import annotations

from dataclasses import replace

import torch

from lora_fx.adapters.updates import Update
from lora_fx.errors import AdapterError

Factors = tuple[torch.Tensor, torch.Tensor]


def pissa_factors(
    weight: torch.Tensor,
    rank: int,
    scale: float,
    niter: int | None = None,
    generator: torch.Generator | None = None,
) -> Factors:
    """The first singular values and vectors of a weight: ``W_r = scale * up @ down``.

    Source: Meng et al., PiSSA, arXiv:2404.02948.

    Args:
        weight: (out, in), in float32 or wider.
        rank: how many.
        scale: the root of a singular value over it is on either side.
        niter: of the subspace iterations that stand for a full decomposition; None means that.
        generator: of the iterations' random start; None takes torch's global one.

    Returns:
        down (r, in) and up (out, r).

    Raises:
        AdapterError: the scale has no root to divide by.
    """
    if scale <= 0:
        raise AdapterError(f"init='pissa' needs a scale above 0, found {scale:g}; change alpha")
    if niter is None:
        rows, values, columns = torch.linalg.svd(weight, full_matrices=False)
    else:
        rows, values, columns = _iterated(weight, rank, niter, generator)
    root = (values[:rank] / scale).sqrt()
    return root[:, None] * columns[:rank], rows[:, :rank] * root


def olora_factors(weight: torch.Tensor, rank: int) -> Factors:
    """The first columns of Q and rows of R, where ``W = Q @ R``: orthonormal columns in up.

    Source: Büyükakyüz, OLoRA, arXiv:2406.01775.

    Args:
        weight: (out, in), in float32 or wider.
        rank: how many.

    Returns:
        down (r, in) and up (out, r).
    """
    up, down = torch.linalg.qr(weight)
    return down[:rank].contiguous(), up[:, :rank].contiguous()


def converted(trained: Update, initial: Update) -> Update:
    """The update of the original base that an update of a changed base stands for.

    PiSSA and OLoRA train beside ``W - scale * up0 @ down0``, and what they trained fits that base
    alone. Beside ``W`` it is ``[up, -up0] @ [down; down0]``, of the sum of the ranks; no value is
    rounded. For whole adapters, but in float32, ``combine([(trained, 1), (initial, -1)])``.

    Args:
        trained: as `adapter_from` reads it after training.
        initial: as `adapter_from` reads it before.

    Returns:
        The update for the base as it was before the adapter was injected.

    Raises:
        AdapterError: one is no product of two factors, or they are not of one layer and scale.
    """
    if not (trained.is_plain and initial.is_plain and initial.bias is None):
        raise AdapterError("an update to convert has vectors beside its two factors")
    if max(trained.groups, initial.groups) > 1:
        raise AdapterError("an update to convert is of a grouped convolution, whose base stays")
    if (trained.shape, trained.scale) != (initial.shape, initial.scale):
        raise AdapterError(
            f"the trained update is of {trained.shape} with scale {trained.scale:g}, the initial "
            f"one of {initial.shape} with scale {initial.scale:g}; give the two of one layer"
        )
    down = torch.cat([trained.down, initial.down])
    return replace(trained, down=down, up=torch.cat([trained.up, -initial.up], dim=1))


def _iterated(
    weight: torch.Tensor, rank: int, niter: int, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A randomised decomposition: Halko et al., arXiv:0909.4061, algorithms 4.4 and 5.1.

    Without oversampling, and from the shorter side, as PEFT asks torch for it.
    """
    if weight.shape[0] < weight.shape[1]:
        rows, values, columns = _iterated(weight.T, rank, niter, generator)
        return columns.T, values, rows.T
    start = torch.randn(weight.shape[1], rank, generator=generator, dtype=weight.dtype)
    basis = torch.linalg.qr(weight @ start.to(weight.device)).Q
    for _ in range(niter):
        basis = torch.linalg.qr(weight.T @ basis).Q
        basis = torch.linalg.qr(weight @ basis).Q
    rows, values, columns = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return basis @ rows, values, columns
