"""Rank and alpha, checked, and the scale that they mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeGuard

from lora_fx.adapters.safe_regex import check_regexes
from lora_fx.errors import AdapterError


def scale_of(alpha: float, rank: int, use_rslora: bool) -> float:
    """The scale that an alpha means at a rank: alpha / r, or alpha / sqrt(r) under rsLoRA."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def checked_rank(where: str, rank: object) -> int:
    """Returns a rank, or refuses what is not a positive integer."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise AdapterError(f"{where} is {rank!r:.80}, expected a positive integer")
    return rank


def check_cut(rank: object, energy: object) -> None:
    """Refuses other than just one of a rank to leave and a fraction of the energy to hold."""
    if (rank is None) == (energy is None):
        raise AdapterError(f"rank is {rank!r:.80} and energy {energy!r:.80}: give one of the two")
    if rank is not None:
        checked_rank("rank", rank)
    if energy is not None and not (is_number(energy) and 0 < energy <= 1):
        raise AdapterError(f"energy is {energy!r:.80}, expected a fraction, above 0 and at most 1")


def checked_alpha(where: str, alpha: object) -> float:
    """Returns an alpha, or refuses what is not a finite number."""
    if not is_number(alpha):
        raise AdapterError(f"{where} is {alpha!r:.80}, expected a finite number")
    return alpha


def alpha_in(texts: Mapping[str, str], name: str = "alpha") -> float | None:
    """The alpha that the texts of a file say, or None; refuses what is not a finite number."""
    text = texts.get(name)
    if text is None:
        return None
    try:
        alpha: object = float(text)
    except ValueError:
        alpha = text
    return checked_alpha(f"{name} of its metadata", alpha)


def checked_ranks(pattern: Mapping[str, object]) -> dict[str, int]:
    """Returns a rank_pattern whose keys are bounded regexes and whose values are ranks."""
    check_regexes(pattern, "rank_pattern")
    return {key: checked_rank(f"rank_pattern[{key!r}]", rank) for key, rank in pattern.items()}


def checked_alphas(pattern: Mapping[str, object]) -> dict[str, float]:
    """Returns an alpha_pattern whose keys are bounded regexes and whose values are alphas."""
    check_regexes(pattern, "alpha_pattern")
    return {key: checked_alpha(f"alpha_pattern[{key!r}]", a) for key, a in pattern.items()}


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number, and no bool."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= 1.7976931348623157e308  # false for NaN, and for ints too big for a float


def alpha_for(scale: float, divisor: float) -> float:
    """The alpha that a reader divides back into a scale, a whole number if one does.

    Exact for every scale that was made by the same division; another may move by its last bit,
    for a division does not reach every float.

    Args:
        scale: what the update is multiplied by.
        divisor: the rank, or its square root under rsLoRA.
    """
    alpha = scale * divisor
    near = (round(alpha), alpha, math.nextafter(alpha, -math.inf), math.nextafter(alpha, math.inf))
    return min(near, key=lambda candidate: abs(candidate / divisor - scale))
