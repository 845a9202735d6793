"""Matrices that are not computed until they are needed.

A region of a graph composes into an expression of small factors; only its end result is ever
made dense, once, in a dtype that the caller chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch


class Matrix(Protocol):
    """A matrix of known shape. Vectors are matrices of one column."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Computes it in a floating dtype. The result must not be written to."""


@dataclass(frozen=True, eq=False)
class Identity:
    """Ones on the diagonal."""

    size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(size, size)."""
        return self.size, self.size

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Made only where an identity is summed with something."""
        return torch.eye(self.size, dtype=dtype)


@dataclass(frozen=True, eq=False)
class Leaf:
    """A constant of the graph, fetched when read."""

    shape: tuple[int, int]
    fetch: Callable[[], torch.Tensor]

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The constant itself, if it has the dtype."""
        return self.fetch().to(dtype).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Product:
    """``left @ right``."""

    left: Matrix
    right: Matrix

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of the left, columns of the right."""
        return self.left.shape[0], self.right.shape[1]

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """One matrix product of the two made dense."""
        return self.left.dense(dtype) @ self.right.dense(dtype)


@dataclass(frozen=True, eq=False)
class Sum:
    """``left + right``, of one shape."""

    left: Matrix
    right: Matrix

    @property
    def shape(self) -> tuple[int, int]:
        """That of either."""
        return self.left.shape

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """A product on the right is accumulated in the pass that adds it."""
        left = self.left.dense(dtype)
        if isinstance(self.right, Product):
            return torch.addmm(left, self.right.left.dense(dtype), self.right.right.dense(dtype))
        return left + self.right.dense(dtype)


@dataclass(frozen=True, eq=False)
class RowScaled:
    """``diag(factor) @ matrix``; a factor of one element scales every row."""

    factor: Matrix
    matrix: Matrix

    @property
    def shape(self) -> tuple[int, int]:
        """That of the matrix."""
        return self.matrix.shape

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """One pass over the matrix."""
        return self.factor.dense(dtype) * self.matrix.dense(dtype)


def product(left: Matrix, right: Matrix) -> Matrix:
    """``left @ right``, without the identity on either side."""
    if isinstance(left, Identity):
        return right
    return left if isinstance(right, Identity) else Product(left, right)


def added(left: Matrix, right: Matrix) -> Matrix:
    """``left + right``. What is already a low-rank product goes to the right."""
    return Sum(right, left) if isinstance(left, Product) else Sum(left, right)


def total(left: Matrix | None, right: Matrix | None) -> Matrix | None:
    """The sum, where None is zero."""
    if left is None or right is None:
        return left if right is None else right
    return added(left, right)
