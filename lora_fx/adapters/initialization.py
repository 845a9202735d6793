"""Initialization of a fresh adapter, layer by layer; PEFT's ``init_lora_weights``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lora_fx.algebra.truncation import Factors
from lora_fx.errors import AdapterError
from lora_fx.layers.layer_types import TYPES
from lora_fx.numerics import widened

Weight = Callable[[], torch.Tensor]

_RANDOM = ("kaiming", "gaussian")
_FROM_WEIGHT = ("pissa", "olora")
_NITER = re.compile(r"pissa_niter_([0-9]{1,3})")


@dataclass(frozen=True, eq=False)
class Initial:
    """What one layer starts from.

    Attributes:
        down: (r, in, *kernel).
        up: (out, r), or (out, r / groups) beside a grouped convolution.
        residual: what takes the place of the base weight ``W``: ``W - scale * up @ down``, (out,
            in) in the dtype of ``W``; None where the base stays as it is.
    """

    down: torch.Tensor
    up: torch.Tensor
    residual: torch.Tensor | None = None


def initial(
    how: str,
    shape: tuple[int, ...],
    rank: int,
    scale: float,
    layer: str,
    weight: Weight | None = None,
    generator: torch.Generator | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    groups: int = 1,
) -> Initial:
    """Makes the first values of one update; with them the layer computes what it did before.

    As PEFT's ``init_lora_weights``: ``kaiming``, its True, has a down that is uniform in plus or
    minus 1 / sqrt(fan in) and an up of zeros; ``gaussian`` has a normal down of deviation 1 / r;
    ``orthogonal`` has two factors that are not zero and whose product is. ``pissa``,
    ``pissa_niter_<N>`` and ``olora`` take a part out of the base weight, see `pissa_factors` and
    `olora_factors`. An embedding has a down of zeros and a normal up, whatever is asked for, and a
    convolution knows the first two alone; both are so in PEFT.

    Args:
        how: one of these names.
        shape: (out, in, *kernel) of the layer, whatever way it stores its weight.
        rank: of the update.
        scale: that the update will have.
        layer: the name of a `LayerType`, as a `Site` has it.
        weight: gives the base weight in that shape; called by PiSSA and OLoRA alone.
        generator: source of the random values; None takes torch's global one.
        dtype: of the factors; what they lose by it, the residual has.
        groups: of a convolution.

    Raises:
        AdapterError: there is no such name, or not for such a layer, rank, scale or weight.
    """
    _check(checked_init(how), shape, rank, layer, groups)
    if TYPES[layer].reads_ids:
        factors = torch.zeros(rank, shape[1]), _normal(generator, shape[0], rank)
    elif how in _RANDOM:
        down = _random(how, (rank, *shape[1:]), generator)
        factors = down, torch.zeros(shape[0], rank // groups)
    elif how == "orthogonal":
        factors = _orthogonal(shape, rank, generator)
    else:
        return _from_weight(how, rank, scale, weight, generator, dtype)
    return Initial(factors[0].to(dtype), factors[1].to(dtype))


def checked_init(how: object) -> str:
    """Returns the name of a way to start, or refuses what is none."""
    known = (*_RANDOM, "orthogonal", *_FROM_WEIGHT)
    if isinstance(how, str) and (how in known or _NITER.fullmatch(how)):
        return how
    names = ", ".join([*known, "pissa_niter_<N>"])
    raise AdapterError(f"init is {how!r:.80}, expected one of {names}")


def _check(how: str, shape: tuple[int, ...], rank: int, layer: str, groups: int) -> None:
    if layer not in TYPES:
        raise AdapterError(f"layer is {layer!r:.80}, expected one of {', '.join(TYPES)}")
    if rank % groups:
        raise AdapterError(f"rank {rank} is no multiple of the convolution's {groups} groups")
    if how in _RANDOM or TYPES[layer].reads_ids:
        return
    if not TYPES[layer].is_linear:
        raise AdapterError(f"init={how!r} is for linear layers, found a {layer}: use 'kaiming'")
    if how == "orthogonal" and rank % 2:
        raise AdapterError(f"init='orthogonal' needs an even rank, found {rank}")
    if how != "orthogonal" and rank > min(shape):
        raise AdapterError(f"init={how!r} of a weight {shape}: the rank is {rank}, too high")


def _normal(generator: torch.Generator | None, *shape: int) -> torch.Tensor:
    # float32 whatever torch.set_default_dtype says: one start a seed, and halves have no qr.
    return torch.randn(*shape, generator=generator, dtype=torch.float32)


def _random(how: str, shape: tuple[int, ...], generator: torch.Generator | None) -> torch.Tensor:
    if how == "gaussian":
        return _normal(generator, *shape) / shape[0]
    down = torch.empty(shape, dtype=torch.float32)
    return torch.nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)


def _orthogonal(shape: tuple[int, ...], rank: int, generator: torch.Generator | None) -> Factors:
    """Each factor lives in one half of an orthonormal basis, so their product is zero."""
    basis, _ = torch.linalg.qr(_normal(generator, rank, rank))
    down = _normal(generator, shape[1], rank // 2) @ basis[0::2]
    up = _normal(generator, rank // 2, shape[0]).T @ basis[1::2]
    return down.T.contiguous() / 10, up / 10


def _from_weight(
    how: str,
    rank: int,
    scale: float,
    weight: Weight | None,
    generator: torch.Generator | None,
    dtype: torch.dtype,
) -> Initial:
    if weight is None:
        raise AdapterError(f"init={how!r} is made of the base weight, which is not given")
    base = weight().detach()
    if not base.is_floating_point() or not base.isfinite().all():
        raise AdapterError(f"init={how!r} needs finite floating-point weights: is it damaged?")
    wide = widened(base)
    if how == "olora":
        down, up = olora_factors(wide, rank)
    else:
        iterations = _NITER.fullmatch(how)
        niter = None if iterations is None else int(iterations[1])
        down, up = pissa_factors(wide, rank, scale, niter, generator)
    down, up = down.to(dtype), up.to(dtype)
    taken = scale * up.to(wide.dtype) @ down.to(wide.dtype)
    return Initial(down, up, (wide - taken).to(base.dtype))


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
