"""Low-rank decomposition of an expression: a base plus products of known factors."""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch

from lora_fx.algebra import matrix_expr as m
from lora_fx.algebra.evaluate import dense
from lora_fx.algebra.matrix_expr import Matrix


class NotLowRankError(Exception):
    """Why a matrix cannot be read so."""


class Beside(NamedTuple):
    """``(diag(row) base + the sum of what is added) diag(col)``; None is a column of ones."""

    row: Matrix | None
    col: Matrix | None
    added: list[Matrix]


def beside(base: Matrix, whole: Matrix) -> Beside:
    """Reads an expression in a base as what stands beside it: ``W + diag(g) W`` is diag(1 + g) W.

    Raises:
        NotLowRankError: the base is in it otherwise, or not at all.
    """
    ones, col = m.repeated(1.0, base.shape[0]), None
    factors: list[Matrix] = []
    added: list[Matrix] = []
    pending = [(ones, whole)]
    while pending:
        factor, term = pending.pop()
        alone = col is None and not (pending or factors or added)
        match term:
            case _ if term == base:
                factors.append(factor)
            case m.DiagMul(own, inner):
                pending.append((m.scaled(own, factor), inner))
            case m.Transposed(m.DiagMul(each, inner)) if alone:  # an input's, at all its places
                col = each.left if isinstance(each, m.Kron) else each
                pending.append((factor, m.transposed(inner)))
            case m.Sum(left, right):
                pending += [(factor, right), (factor, left)]
            case _ if not set(m.leaves(base)) <= set(m.leaves(term)):
                added.append(term if factor is ones else m.scaled(factor, term))
            case _:
                raise NotLowRankError("the base weight itself is scaled or moved")
    if not factors:
        raise NotLowRankError("the base weight itself is scaled or moved")
    return Beside(None if factors == [ones] else reduce(m.Sum, factors), col, added)


def is_added(base: Matrix, whole: Matrix) -> bool:
    """Whether ``whole - base`` is the same whatever the base is, as far as the expression shows."""
    if isinstance(whole, m.Replaced):
        inside = is_added(m.rows(base, whole.index), whole.rows)
        return inside and is_added(base, whole.matrix)
    try:
        found = beside(base, whole)
    except NotLowRankError:
        return False
    return found.row is None and found.col is None


def factors_beside(
    base: Matrix, whole: Matrix, any_rank: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads ``whole = base + up @ down``.

    Several products are put side by side: their ranks add up. That is to be less than the sizes
    of the matrix, unless ``any_rank`` will do: factors are what an adapter has, and may be saved.

    Returns:
        down (r, in) and up (out, r), in float32 or wider.

    Raises:
        NotLowRankError: the base is scaled, or something else is added than products of low rank.
    """
    pairs = pairs_beside(base, whole, any_rank)
    down = torch.cat([dense(right, torch.float32) for _, right in pairs])
    up = torch.cat([dense(left, torch.float32) for left, _ in pairs], dim=1)
    return down, up


def pairs_beside(
    base: Matrix, whole: Matrix, any_rank: bool = False
) -> list[tuple[Matrix, Matrix]]:
    """The products of `factors_beside` as expressions, which computes nothing.

    Raises:
        NotLowRankError: as there.
    """
    found = beside(base, whole)
    if found.row is not None or found.col is not None:
        raise NotLowRankError("the base weight itself is scaled")
    if not found.added:
        raise NotLowRankError("nothing is added to the base weight")
    pairs = [split(term) for term in found.added]
    rank = sum(right.shape[0] for _, right in pairs)
    if rank >= min(whole.shape) and not any_rank:
        raise NotLowRankError(f"what is added has rank {rank}, no less than the layer")
    return pairs


def blocks_beside(base: Matrix, whole: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads ``whole = base + the blocks left[e] @ right[e], one below the other``.

    Returns:
        left (blocks, rows, r) and right (blocks, r, columns), as they are held; of one product of
        two matrices, left (rows, r) and right (r, columns).

    Raises:
        NotLowRankError: it is not written so.
    """
    match beside(base, whole):
        case Beside(None, None, [m.Reshaped(m.Product(m.BlockDiag() as left, m.Leaf() as right))]):
            count, _, rank = left.blocks
            if not left.turned:
                return left.fetch(), right.fetch().reshape(count, rank, -1)
        case Beside(None, None, [m.Product(m.Leaf() as left, m.Leaf() as right)]):
            return left.fetch(), right.fetch()
    raise NotLowRankError("what is added is no product for each block")


def additive(base: m.Leaf, whole: Matrix) -> Matrix:
    """The same as a sum where rows take the place of the base's: ``W + P (rows - W[places])``."""
    if isinstance(whole, m.Transposed):
        return m.transposed(additive(base, whole.of))
    if not isinstance(whole, m.Replaced):
        return whole
    # Under another name: what is added is a number, whatever the base.
    known = m.Leaf(base.shape, ("known", base.key), base.fetch)
    own = m.exchanged(whole.matrix, lambda leaf: known if leaf == base else leaf)
    change = m.Sum(whole.rows, m.scaled(m.number(-1), m.rows(own, whole.index)))
    count, size = whole.index.count, whole.shape[0]
    places = m.ScatterRows(m.Identity(count), whole.index, size)
    return m.Sum(whole.matrix, m.Product(places, change))


def column_beside(base: Matrix | None, whole: Matrix | None) -> torch.Tensor | None:
    """What is added to a bias, (out,), or None.

    Raises:
        NotLowRankError: the base's bias is scaled.
    """
    terms = [] if whole is None else m.parts(whole, m.Sum)
    if base is not None and base not in terms:
        raise NotLowRankError("the base bias itself is scaled or moved")
    if base is not None:
        terms.remove(base)
    columns = [dense(term, torch.float32).reshape(-1) for term in terms]
    return sum(columns[1:], columns[0]) if columns else None


def split(term: Matrix) -> tuple[Matrix, Matrix]:
    """A product as two factors, cut where it is narrowest.

    Raises:
        NotLowRankError: it is none.
    """
    chain = m.parts(term, m.Product)
    if len(chain) == 1:
        raise NotLowRankError("what is added is no product of smaller factors")
    cut = min(range(1, len(chain)), key=lambda place: chain[place].shape[0])
    return reduce(m.product, chain[:cut]), reduce(m.product, chain[cut:])
