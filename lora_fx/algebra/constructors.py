"""How expressions are built: identities vanish, and what acts on rows acts on the left factor."""

from __future__ import annotations

from dataclasses import replace

import torch

from lora_fx.algebra.index_expr import Index
from lora_fx.algebra.matrix_expr import (
    Blocks,
    Identity,
    Leaf,
    Matrix,
    Placed,
    Product,
    Rows,
    RowScaled,
    Sum,
    Transposed,
)


def number(value: float) -> Matrix:
    """A factor for every row."""
    return Leaf((1, 1), ("number", value), lambda: torch.tensor([[value]], dtype=torch.float64))


def repeated(value: float, size: int) -> Matrix:
    """A column of one number."""
    key = ("repeated", value)
    return Leaf((size, 1), key, lambda: torch.full((size, 1), value, dtype=torch.float64))


def product(left: Matrix, right: Matrix) -> Matrix:
    """``left @ right``."""
    if isinstance(left, Identity):
        return right
    if isinstance(right, Identity):
        return left
    if isinstance(left, RowScaled):
        return scaled(left.factor, product(left.matrix, right))
    if isinstance(left, Rows):
        return rows(product(left.matrix, right), left.index)
    if isinstance(left, Placed):
        return placed(product(left.matrix, right), left.index, left.size)
    return Product(left, right)


def scaled(factor: Matrix, matrix: Matrix) -> Matrix:
    """``diag(factor) @ matrix``."""
    if isinstance(matrix, Product):
        return Product(scaled(factor, matrix.left), matrix.right)
    return RowScaled(factor, matrix)


def rows(matrix: Matrix, index: Index) -> Matrix:
    """Some rows of a matrix."""
    if isinstance(matrix, Product):
        return Product(rows(matrix.left, index), matrix.right)
    return Rows(matrix, index)


def placed(matrix: Matrix, index: Index, size: int) -> Matrix:
    """A matrix among rows of zeros."""
    if isinstance(matrix, Product):
        return Product(placed(matrix.left, index, size), matrix.right)
    return Placed(matrix, index, size)


def total(left: Matrix | None, right: Matrix | None) -> Matrix | None:
    """The sum, where None is zero."""
    if left is None or right is None:
        return left if right is None else right
    return Sum(left, right)


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
    if isinstance(matrix, RowScaled) and matrix.factor.shape == (1, 1):
        return scaled(matrix.factor, transposed(matrix.matrix))
    if isinstance(matrix, Blocks):
        count, high, wide = matrix.blocks
        key, fetch = ("transposed", matrix.key), matrix.fetch
        return replace(
            matrix, blocks=(count, wide, high), key=key, fetch=lambda: fetch().transpose(1, 2)
        )
    return matrix if isinstance(matrix, Identity) else Transposed(matrix)
