"""Rotations from the numbers that PEFT and LyCORIS train in their place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from lora_fx.errors import AdapterError
from lora_fx.kinds.validation import flag, number, wide


def from_peft(leaf: str, values: torch.Tensor, settings: Mapping[str, Any]) -> torch.Tensor:
    """The rotations of PEFT's OFT: an exact or a cut off Cayley transform.

    With S skew-symmetric, ``(I - S)(I + S)^-1``, or the series of ``(I + S)(I - S)^-1``, which is
    its inverse, as far as ``num_cayley_neumann_terms`` says. Under ``coft`` each S is shortened
    first. Source: ``OFTRotationModule`` of PEFT 0.21.

    Args:
        leaf: that the values are.
        values: (blocks, b (b - 1) / 2), what stands above the diagonals.
        settings: as in PEFT's config, and with its defaults.

    Returns:
        (blocks, b, b), in float32 or wider.

    Raises:
        AdapterError: no b fits the values; a setting is wrong.
    """
    count, length = values.shape
    size = (1 + math.isqrt(1 + 8 * length)) // 2
    if size * (size - 1) // 2 != length or not count:
        raise AdapterError(f"{leaf} is {tuple(values.shape)}, expected (blocks, b (b - 1) / 2)")
    numbers = wide(values)
    skew = numbers.new_zeros(count, size, size)
    rows, columns = torch.triu_indices(size, size, 1)
    skew[:, rows, columns] = numbers
    skew = skew - skew.mT
    if flag(settings, "coft", False):
        skew = _shortened(skew, number(settings, "eps", 6e-5) / math.sqrt(count))
    eye = torch.eye(size, dtype=skew.dtype)
    if flag(settings, "use_cayley_neumann", True):
        terms = settings.get("num_cayley_neumann_terms", 5)
        if type(terms) is not int:
            said = f"setting num_cayley_neumann_terms is {terms!r:.80}"
            raise AdapterError(f"{said}, expected an integer")
        return _series(skew, eye, terms)
    return _cayley(-skew, eye)


def from_lycoris(blocks: torch.Tensor, limit: float) -> torch.Tensor:
    """The rotations of LyCORIS' Diag-OFT: ``(I + Q)(I - Q)^-1`` with ``Q = blocks - blocks^T``.

    Args:
        blocks: (blocks, b, b).
        limit: of the norm of all Q together, or 0 for none.

    Returns:
        (blocks, b, b), in float32 or wider.
    """
    whole = wide(blocks)
    skew = whole - whole.mT
    norm = float(skew.norm()) + 1e-8
    if 0 < limit < norm:
        skew = skew * (limit / norm)
    eye = torch.eye(blocks.shape[1], dtype=skew.dtype)
    return _cayley(skew, eye)


def _cayley(skew: torch.Tensor, eye: torch.Tensor) -> torch.Tensor:
    """``(I + S)(I - S)^-1``."""
    result: torch.Tensor = torch.linalg.solve(eye - skew, eye + skew, left=False)
    return result


def _shortened(skew: torch.Tensor, limit: float) -> torch.Tensor:
    """Each block no longer than a limit."""
    norm = skew.flatten(1).norm(dim=1)[:, None, None]
    return torch.where(norm <= limit, skew, limit * (skew / norm))


def _series(skew: torch.Tensor, eye: torch.Tensor, terms: int) -> torch.Tensor:
    """``I + 2 S + 2 S² + ...``; from three terms on the last power is counted once."""
    total, power = eye.expand_as(skew), skew
    if terms <= 1:
        return total.clone()
    total = total + 2 * skew
    last = 1 if terms == 2 else max(terms, 4) - 1
    for exponent in range(2, last + 1):
        power = power @ skew
        total = total + (power if exponent == last else 2 * power)
    return total
