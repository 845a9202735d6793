"""Low-rank decomposition of an expression: a base plus products of known factors."""

from __future__ import annotations

from functools import reduce

import torch

from lora_fx.algebra.evaluate import dense
from lora_fx.algebra.matrix_expr import Matrix, Product, RowScaled, Sum, parts, product


class NotLowRankError(Exception):
    """Why a matrix cannot be read so."""


def factors_beside(base: Matrix, whole: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads ``whole = base + up @ down``.

    Several products are put side by side: their ranks add up.

    Returns:
        down (r, in) and up (out, r), in float32 or wider.

    Raises:
        NotLowRankError: the base is scaled, or something else is added than products of low rank.
    """
    terms = parts(whole, Sum)
    if base not in terms:
        raise NotLowRankError("the base weight itself is scaled or moved")
    terms.remove(base)
    if any(isinstance(term, RowScaled) and base in parts(term.matrix, Sum) for term in terms):
        raise NotLowRankError("the base weight itself is scaled")
    if not terms:
        raise NotLowRankError("nothing is added to the base weight")
    pairs = [_split(term) for term in terms]
    down = torch.cat([dense(right, torch.float32) for _, right in pairs])
    up = torch.cat([dense(left, torch.float32) for left, _ in pairs], dim=1)
    if down.shape[0] >= min(whole.shape):
        raise NotLowRankError(f"what is added has rank {down.shape[0]}, no less than the layer")
    return down, up


def column_beside(base: Matrix | None, whole: Matrix | None) -> torch.Tensor | None:
    """What is added to a bias, (out,), or None.

    Raises:
        NotLowRankError: the base's bias is scaled.
    """
    terms = [] if whole is None else parts(whole, Sum)
    if base is not None and base not in terms:
        raise NotLowRankError("the base bias itself is scaled or moved")
    if base is not None:
        terms.remove(base)
    columns = [dense(term, torch.float32).reshape(-1) for term in terms]
    return sum(columns[1:], columns[0]) if columns else None


def _split(term: Matrix) -> tuple[Matrix, Matrix]:
    """A product, cut where it is narrowest."""
    chain = parts(term, Product)
    if len(chain) == 1:
        raise NotLowRankError("what is added is no product of smaller factors")
    cut = min(range(1, len(chain)), key=lambda place: chain[place].shape[0])
    return reduce(product, chain[:cut]), reduce(product, chain[cut:])
