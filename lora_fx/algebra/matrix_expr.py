"""Expressions of matrices: data, computed by `evaluate` when somebody needs the numbers.

A region of a graph composes into an expression of small factors. Two expressions are equal if
they are written alike, which costs no arithmetic. Vectors are matrices of one column.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch

from lora_fx.algebra.index_expr import Index


@dataclass(frozen=True)
class Identity:
    """Ones on the diagonal."""

    size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(size, size)."""
        return self.size, self.size


@dataclass(frozen=True)
class Leaf:
    """A constant, fetched when read. Leaves of one shape and key are equal."""

    shape: tuple[int, int]
    key: Hashable
    fetch: Callable[[], torch.Tensor] = field(compare=False)


@dataclass(frozen=True)
class Blocks:
    """A block diagonal; what is fetched is (blocks, rows of each, columns of each)."""

    blocks: tuple[int, int, int]
    key: Hashable
    fetch: Callable[[], torch.Tensor] = field(compare=False)

    @property
    def shape(self) -> tuple[int, int]:
        """All rows, all columns."""
        count, rows, columns = self.blocks
        return count * rows, count * columns


@dataclass(frozen=True)
class Transposed:
    """A matrix on its side."""

    of: Matrix

    @property
    def shape(self) -> tuple[int, int]:
        """The other way round."""
        return self.of.shape[1], self.of.shape[0]


@dataclass(frozen=True)
class Product:
    """``left @ right``."""

    left: Matrix
    right: Matrix

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of the left, columns of the right."""
        return self.left.shape[0], self.right.shape[1]


@dataclass(frozen=True)
class Sum:
    """``left + right``, of one shape."""

    left: Matrix
    right: Matrix

    @property
    def shape(self) -> tuple[int, int]:
        """That of either."""
        return self.left.shape


@dataclass(frozen=True)
class RowScaled:
    """``diag(factor) @ matrix``; a factor of one element scales every row."""

    factor: Matrix
    matrix: Matrix

    @property
    def shape(self) -> tuple[int, int]:
        """That of the matrix."""
        return self.matrix.shape


@dataclass(frozen=True)
class Rows:
    """Some rows of a matrix."""

    matrix: Matrix
    index: Index

    @property
    def shape(self) -> tuple[int, int]:
        """As many rows as the index has places."""
        return self.index.count, self.matrix.shape[1]


@dataclass(frozen=True)
class Placed:
    """A matrix whose rows go to places among ``size`` rows; the others are zero."""

    matrix: Matrix
    index: Index
    size: int

    @property
    def shape(self) -> tuple[int, int]:
        """``size`` rows."""
        return self.size, self.matrix.shape[1]


Matrix = Identity | Leaf | Blocks | Transposed | Product | Sum | RowScaled | Rows | Placed


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
