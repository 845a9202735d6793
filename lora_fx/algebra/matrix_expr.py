"""Expressions of matrices: data, computed by `evaluate` when somebody needs the numbers.

A region of a graph composes into an expression of small factors. Two expressions are equal if
they are written alike, which costs no arithmetic. Vectors are matrices of one column.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, fields, replace
from math import prod
from typing import Any

import torch

from lora_fx.algebra.index_expr import Index


class Expression:
    """A node that is made of others."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        match self:
            case Sum(like, _) | Quotient(like, _) | DiagMul(_, like) | Replaced(like, _, _):
                return like.shape
            case Product(left, right):
                return left.shape[0], right.shape[1]
            case Transposed(inner):
                return inner.shape[1], inner.shape[0]
            case GatherRows(inner, index):
                return index.count, inner.shape[1]
            case ScatterRows(inner, _, size):
                return size, inner.shape[1]
            case Identity(size):
                return size, size
            case BlockDiag((count, high, wide), _, _, _):
                return count * high, count * wide
            case Kron(left, right):
                return left.shape[0] * right.shape[0], left.shape[1] * right.shape[1]
            case RowNorm(inner):
                return inner.shape[0], 1
            case Repeated(_, size):
                return size, 1
        raise TypeError(type(self).__name__)


@dataclass(frozen=True)
class Identity(Expression):
    """Ones on the diagonal."""

    size: int


@dataclass(frozen=True)
class Leaf:
    """A constant, fetched when read. Leaves of one shape and key are equal."""

    shape: tuple[int, int]
    key: Hashable
    fetch: Callable[[], torch.Tensor] = field(compare=False)


@dataclass(frozen=True)
class Repeated(Expression):
    """A column of one number."""

    value: float
    size: int


@dataclass(frozen=True)
class BlockDiag(Expression):
    """A block diagonal; what is fetched is (blocks, rows of each, columns of each), or turned."""

    blocks: tuple[int, int, int]
    key: Hashable
    fetch: Callable[[], torch.Tensor] = field(compare=False)
    turned: bool = False


@dataclass(frozen=True)
class Transposed(Expression):
    """A matrix on its side."""

    of: Matrix


@dataclass(frozen=True)
class Pair(Expression):
    """Two matrices, of one shape where nothing else is said."""

    left: Matrix
    right: Matrix


class Sum(Pair):
    """``left + right``."""


class Quotient(Pair):
    """``left / right``, number by number."""


class Product(Pair):
    """``left @ right``."""


class Kron(Pair):
    """The Kronecker product: each number of the left times all of the right."""


@dataclass(frozen=True)
class DiagMul(Expression):
    """``diag(factor) @ matrix``; a factor of one element scales every row."""

    factor: Matrix
    matrix: Matrix


@dataclass(frozen=True)
class GatherRows(Expression):
    """Some rows of a matrix."""

    matrix: Matrix
    index: Index


@dataclass(frozen=True)
class ScatterRows(Expression):
    """A matrix whose rows go to places among ``size`` rows; the others are zero."""

    matrix: Matrix
    index: Index
    size: int


@dataclass(frozen=True)
class Replaced(Expression):
    """A matrix some of whose rows are those of another."""

    matrix: Matrix
    index: Index
    rows: Matrix


@dataclass(frozen=True)
class RowNorm(Expression):
    """The length of each row, a column."""

    matrix: Matrix


@dataclass(frozen=True)
class Reshaped:
    """The same numbers, row by row, in rows of another length."""

    matrix: Matrix
    shape: tuple[int, int]


Matrix = (
    Identity | Leaf | Repeated | BlockDiag | Transposed | Product | Sum | DiagMul | GatherRows
    | ScatterRows | Replaced | Kron | RowNorm | Quotient | Reshaped
)  # fmt: skip


def parts(matrix: Matrix, of: type[Sum] | type[Product]) -> list[Matrix]:
    """The summands, or the factors, from left to right, however they are nested."""
    found: list[Matrix] = []
    pending = [matrix]
    while pending:
        here = pending.pop()
        if isinstance(here, Sum | Product) and isinstance(here, of):
            pending += [here.right, here.left]
        else:
            found.append(here)
    return found


def leaves(matrix: Any) -> Iterator[Leaf | BlockDiag | Index]:
    """What an expression is made of, from left to right."""
    if isinstance(matrix, Leaf | BlockDiag | Index):
        yield matrix
    elif isinstance(matrix, Matrix):
        for item in fields(matrix):
            yield from leaves(getattr(matrix, item.name))


def exchanged(matrix: Any, change: Callable[[Any], Any]) -> Any:
    """The expression with what a function gives in the place of its leaves."""
    if isinstance(matrix, Leaf | BlockDiag | Index):
        return change(matrix)
    if not isinstance(matrix, Matrix):
        return matrix
    inner = {item.name: exchanged(getattr(matrix, item.name), change) for item in fields(matrix)}
    made = replace(matrix, **inner)
    if isinstance(made, Transposed) and isinstance(made.of, Transposed):
        return made.of.of
    return made


def holding(leaf: Leaf | BlockDiag | Index, value: torch.Tensor) -> Leaf | BlockDiag | Index:
    """A leaf of the same shape, of another tensor."""
    if isinstance(leaf, Index):
        return replace(leaf, key=("tensor", id(value)), places=lambda: value)
    return replace(leaf, key=("tensor", id(value)), fetch=lambda: value)


def constant(value: torch.Tensor, shape: tuple[int, int] | None = None) -> Leaf:
    """A tensor as a matrix: of as many rows, by default, as its first axis is long."""
    sizes = tuple(value.shape)
    return Leaf(shape or (sizes[0], prod(sizes[1:])), ("tensor", id(value)), lambda: value)


def diagonal(value: torch.Tensor) -> BlockDiag:
    """A tensor of (blocks, rows, columns) as a block diagonal."""
    count, high, wide = value.shape
    return BlockDiag((count, high, wide), ("tensor", id(value)), lambda: value)


def number(value: float) -> Matrix:
    """A factor for every row."""
    return Repeated(value, 1)


def repeated(value: float, size: int) -> Matrix:
    """A column of one number."""
    return Repeated(value, size)


def product(left: Matrix, right: Matrix) -> Matrix:
    """``left @ right``."""
    if isinstance(left, Identity):
        return right
    if isinstance(right, Identity):
        return left
    if isinstance(left, DiagMul):
        return scaled(left.factor, product(left.matrix, right))
    if isinstance(left, GatherRows):
        return rows(product(left.matrix, right), left.index)
    if isinstance(left, ScatterRows):
        return placed(product(left.matrix, right), left.index, left.size)
    return Product(left, right)


def scaled(factor: Matrix, matrix: Matrix) -> Matrix:
    """``diag(factor) @ matrix``."""
    if isinstance(matrix, Product):
        return Product(scaled(factor, matrix.left), matrix.right)
    return DiagMul(factor, matrix)


def rows(matrix: Matrix, index: Index) -> Matrix:
    """Some rows of a matrix."""
    if isinstance(matrix, Product):
        return Product(rows(matrix.left, index), matrix.right)
    return GatherRows(matrix, index)


def placed(matrix: Matrix, index: Index, size: int) -> Matrix:
    """A matrix among rows of zeros."""
    if isinstance(matrix, Product):
        return Product(placed(matrix.left, index, size), matrix.right)
    return ScatterRows(matrix, index, size)


def total(left: Matrix | None, right: Matrix | None) -> Matrix | None:
    """The sum, where None is zero."""
    if left is None or right is None:
        return left if right is None else right
    return Sum(left, right)


def reshaped(matrix: Matrix, rows: int) -> Matrix:
    """The same numbers in so many rows."""
    columns = matrix.shape[0] * matrix.shape[1] // max(rows, 1)
    return matrix if rows == matrix.shape[0] else Reshaped(matrix, (rows, columns))


def normed(lengths: Matrix, matrix: Matrix) -> Matrix:
    """Every row at the length that a column says: DoRA."""
    return DiagMul(Quotient(lengths, RowNorm(matrix)), matrix)


def columns_scaled(matrix: Matrix, factor: Matrix) -> Matrix:
    """``matrix @ diag(factor)``; each factor is of several columns if there are more of those."""
    many = matrix.shape[1] // max(factor.shape[0], 1)
    each = factor if many == 1 else Kron(factor, repeated(1.0, many))
    return transposed(scaled(each, transposed(matrix)))


def signed(matrix: Matrix, sign: float) -> Matrix:
    """A matrix, or some multiple of it."""
    return matrix if sign == 1 else scaled(number(sign), matrix)


def transposed(matrix: Matrix) -> Matrix:
    """The matrix on its side."""
    if isinstance(matrix, Transposed):
        return matrix.of
    if isinstance(matrix, Product):
        return Product(transposed(matrix.right), transposed(matrix.left))
    if isinstance(matrix, Sum):
        return Sum(transposed(matrix.left), transposed(matrix.right))
    if isinstance(matrix, DiagMul) and matrix.factor.shape == (1, 1):
        return scaled(matrix.factor, transposed(matrix.matrix))
    if isinstance(matrix, BlockDiag):
        count, high, wide = matrix.blocks
        return replace(matrix, blocks=(count, wide, high), turned=not matrix.turned)
    return matrix if isinstance(matrix, Identity) else Transposed(matrix)
