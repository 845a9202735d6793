"""Low-rank decomposition of an expression: a base plus products of known factors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch

from lora_fx.algebra.evaluate import dense
from lora_fx.algebra.matrix_expr import (
    Kron,
    Matrix,
    Product,
    RowScaled,
    Sum,
    Transposed,
    leaves,
    parts,
    product,
    repeated,
    scaled,
    transposed,
)


class NotLowRankError(Exception):
    """Why a matrix cannot be read so."""


@dataclass(frozen=True)
class Beside:
    """``(diag(row) base + the sum of what is added) diag(col)``.

    Attributes:
        row: a column of factors, or None for one of ones.
        col: likewise, of the inputs.
        added: the terms.
    """

    row: Matrix | None
    col: Matrix | None
    added: list[Matrix]


def beside(base: Matrix, whole: Matrix) -> Beside:
    """Reads an expression in a base as what stands beside it: ``W + diag(g) W`` is diag(1 + g) W.

    Raises:
        NotLowRankError: the base is in it otherwise, or not at all.
    """
    ones, col = repeated(1.0, base.shape[0]), None
    rows: list[Matrix | None] = []
    added: list[Matrix] = []
    factor, whole = _row(None, whole, ones)
    match whole:
        case Transposed(RowScaled(each, inner)):  # one factor an input, whatever its places
            col, whole = each.left if isinstance(each, Kron) else each, transposed(inner)
    pending = [(factor, whole)]
    while pending:
        factor, term = _row(*pending.pop(), ones)
        if isinstance(term, Sum):
            pending += [(factor, term.right), (factor, term.left)]
        elif term == base:
            rows.append(factor)
        elif set(leaves(base)) <= set(leaves(term)):
            raise NotLowRankError("the base weight itself is scaled or moved")
        else:
            added.append(term if factor is None else scaled(factor, term))
    if not rows:
        raise NotLowRankError("the base weight itself is scaled or moved")
    if rows == [None]:
        return Beside(None, col, added)
    return Beside(reduce(Sum, (ones if row is None else row for row in rows)), col, added)


def _row(factor: Matrix | None, term: Matrix, ones: Matrix) -> tuple[Matrix | None, Matrix]:
    """A term without what scales its rows, and that, a column, together with a factor of all."""
    while isinstance(term, RowScaled):
        own = term.factor if term.factor.shape == ones.shape else scaled(term.factor, ones)
        factor, term = own if factor is None else scaled(factor, own), term.matrix
    return factor, term


def factors_beside(base: Matrix, whole: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads ``whole = base + up @ down``.

    Several products are put side by side: their ranks add up.

    Returns:
        down (r, in) and up (out, r), in float32 or wider.

    Raises:
        NotLowRankError: the base is scaled, or something else is added than products of low rank.
    """
    found = beside(base, whole)
    if found.row is not None or found.col is not None:
        raise NotLowRankError("the base weight itself is scaled")
    if not found.added:
        raise NotLowRankError("nothing is added to the base weight")
    pairs = [_split(term) for term in found.added]
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
