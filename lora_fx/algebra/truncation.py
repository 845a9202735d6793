"""The nearest product of low rank to an expression: its singular values, and where to cut them.

No matrix is made where its factors say enough. What is left out is measured, not estimated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch

from lora_fx.algebra import matrix_expr as m
from lora_fx.algebra.evaluate import dense
from lora_fx.algebra.low_rank import NotLowRankError, split
from lora_fx.algebra.matrix_expr import Matrix

Factors = tuple[torch.Tensor, torch.Tensor]

_WHOLE = 1024  # up to this size all singular values are computed
_WIDE = 1 << 26  # matrices of more numbers are decomposed in float32
_MORE, _ROUNDS = 16, 4  # columns beside those that are asked for, and powers, of a random sketch


@dataclass(frozen=True, eq=False)
class Svd:
    """A singular value decomposition, perhaps of the first values alone.

    Attributes:
        values: in descending order.
        vectors: count -> so many of each side, (rows, count) and (count, columns).
        rest: the Frobenius norm of what the values leave out.
    """

    values: torch.Tensor
    vectors: Callable[[int], Factors]
    rest: float = 0.0

    @property
    def size(self) -> float:
        """The Frobenius norm of the whole."""
        return math.hypot(_size(self.values), self.rest)


class Cut(NamedTuple):
    """A product near to a matrix.

    Attributes:
        up: (rows, r).
        down: (r, columns).
        error: the Frobenius norm of the difference over that of the matrix; 0 of a matrix of zeros.
    """

    up: torch.Tensor
    down: torch.Tensor
    error: float


def cut(svd: Svd, rank: int, dtype: torch.dtype) -> Cut:
    """The product of the first singular values, rounded to a dtype, and its error as rounded."""
    rows, columns = svd.vectors(rank)
    # Half of each singular value on either side, so that neither factor leaves a half's range.
    root = svd.values[:rank].sqrt()
    up, down = (rows * root).contiguous(), (root[:, None] * columns).contiguous()
    kept = up.to(dtype), down.to(dtype)
    rounding = _norm(torch.cat([up, -kept[0].to(up)], 1), torch.cat([down, kept[1].to(up)]))
    left = math.hypot(svd.rest, _size(svd.values[rank:]), rounding)
    return Cut(*kept, left / svd.size if svd.size > 0 else 0.0)


def rank_of(svd: Svd, size: int, rank: int | None, energy: float | None) -> int:
    """How many values to keep: at least one, and not those that together are rounding errors.

    Args:
        svd: of a matrix.
        size: the larger side of the matrix.
        rank: the most to keep, or None.
        energy: the fraction of the squared Frobenius norm to hold, or None.
    """
    values = svd.values
    # All that is cut off counts, or a thousand values below an error would be lost with it.
    noise = 4 * math.sqrt(size) * torch.finfo(values.dtype).eps * float(values[:1].sum())
    tails = values.double().square().flip(0).cumsum(0).flip(0) + svd.rest**2
    most = max(1, int((tails.sqrt() > noise).sum()))
    if energy is not None:
        held = values.double().square().cumsum(0)
        wanted = energy * (float(held[-1:].sum()) + svd.rest**2)
        most = min(most, int((held < wanted).sum()) + 1)
    return most if rank is None else min(rank, most)


def svd_of(
    matrix: Matrix, rank: int | None, energy: float | None, dtype: torch.dtype = torch.float64
) -> Svd:
    """Decomposes an expression.

    By its factors, if it is a sum of narrow products or a Kronecker product; else the matrix
    itself, by a random sketch if it is large.

    Args:
        matrix: what to decompose.
        rank: how many values will be kept at most, or
        energy: the fraction of the squared Frobenius norm that they shall hold.
        dtype: to compute in; a matrix of more than 64 million numbers is computed in float32.
    """
    if isinstance(matrix, m.Transposed):
        return _turned(svd_of(matrix.of, rank, energy, dtype))
    if isinstance(matrix, m.Kron) and _is_of_small(matrix):
        pair = (of_tensor(dense(part, dtype), None, 1.0) for part in (matrix.left, matrix.right))
        return _of_kron(*pair)
    if factors := _narrow(matrix, dtype):
        return of_product(*factors)
    if matrix.shape[0] * matrix.shape[1] > _WIDE:
        dtype = torch.float32
    return of_tensor(dense(matrix, dtype), rank, energy)


def size_of(matrix: Matrix) -> float:
    """The Frobenius norm of an expression, in float64, by its factors if it is narrow."""
    factors = _narrow(matrix, torch.float64)
    return _norm(*factors) if factors else float(dense(matrix, torch.float64).norm())


def _narrow(matrix: Matrix, dtype: torch.dtype) -> Factors | None:
    """A sum of products as one, if that is much less than the matrix."""
    try:
        pairs = [split(term) for term in m.parts(matrix, m.Sum)]
    except NotLowRankError:
        return None
    if not pairs or 2 * sum(right.shape[0] for _, right in pairs) >= min(matrix.shape):
        return None
    up = torch.cat([dense(left, dtype) for left, _ in pairs], dim=1)
    return up, torch.cat([dense(right, dtype) for _, right in pairs])


def of_product(up: torch.Tensor, down: torch.Tensor) -> Svd:
    """Of ``up @ down``, which is not made, by the QR decompositions of the two."""
    (left, above), (right, below) = torch.linalg.qr(up), torch.linalg.qr(down.T)
    rows, values, columns = torch.linalg.svd(above @ below.T, full_matrices=False)
    return Svd(values, lambda count: (left @ rows[:, :count], columns[:count] @ right.T))


def of_tensor(tensor: torch.Tensor, rank: int | None, energy: float | None) -> Svd:
    """Of a matrix: all its values, or as many as are asked for if it is large.

    A sketch by random columns, with powers between which it is made orthogonal: Halko et al.,
    arXiv:0909.4061. For an energy it grows until it holds that.
    """
    side = min(tensor.shape)
    for count in _sketches(rank):
        if side <= max(_WHOLE, 3 * count):
            break
        found = _sketched(tensor, count)
        held = rank is not None or rank_of(found, max(tensor.shape), None, energy) < count
        if held:
            return found
    rows, values, columns = torch.linalg.svd(tensor, full_matrices=False)
    return Svd(values, lambda count: (rows[:, :count], columns[:count]))


def _sketches(rank: int | None) -> Sequence[int]:
    return [64, 256, 1024] if rank is None else [rank + _MORE]


def _sketched(tensor: torch.Tensor, count: int) -> Svd:
    rough, make = tensor.float(), torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(rough @ torch.randn(tensor.shape[1], count, generator=make))[0]
    for _ in range(_ROUNDS):
        basis = _round(rough, basis)
    del rough
    basis = _round(tensor, basis.to(tensor.dtype))  # the last one alone has to be exact
    inner = basis.T @ tensor
    rest = _size(torch.addmm(tensor, basis, inner, alpha=-1))
    rows, values, columns = torch.linalg.svd(inner, full_matrices=False)
    return Svd(values, lambda n: (basis @ rows[:, :n], columns[:n]), rest)


def _round(tensor: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """A basis nearer to the first singular vectors."""
    along = torch.linalg.qr((basis.T @ tensor).T)[0]
    nearer: torch.Tensor = torch.linalg.qr(tensor @ along)[0]
    return nearer


def _of_kron(left: Svd, right: Svd) -> Svd:
    """Of a Kronecker product: the products of the values, and of the vectors of each pair."""
    several = len(right.values)
    values, order = torch.outer(left.values, right.values).flatten().sort(descending=True)

    def vectors(count: int) -> Factors:
        first, second = order[:count] // several, order[:count] % several
        (one, below), (other, beside) = (s.vectors(len(s.values)) for s in (left, right))
        rows = (one[:, None, first] * other[None, :, second]).flatten(0, 1)
        return rows, (below[first, :, None] * beside[second, None, :]).flatten(1)

    return Svd(values, vectors)


def _is_of_small(matrix: m.Kron) -> bool:
    return all(min(part.shape) <= _WHOLE for part in (matrix.left, matrix.right))


def _turned(svd: Svd) -> Svd:
    def vectors(count: int) -> Factors:
        rows, columns = svd.vectors(count)
        return columns.T, rows.T

    return Svd(svd.values, vectors, svd.rest)


def _norm(up: torch.Tensor, down: torch.Tensor) -> float:
    """The Frobenius norm of a product."""
    above, below = torch.linalg.qr(up)[1], torch.linalg.qr(down.T)[1]
    return _size(above @ below.T)


def _size(tensor: torch.Tensor) -> float:
    """The Frobenius norm, in float64: squares of large and small numbers leave float32's range."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def total(terms: Sequence[Matrix]) -> Matrix:
    """The sum of at least one."""
    return reduce(m.Sum, terms)
