"""Evaluates matrix expressions: dense, cheapest product first, in float32 or wider."""

from __future__ import annotations

from itertools import pairwise

import torch

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
    parts,
)

Factor = torch.Tensor | Blocks


def dense(matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
    """Computes a matrix in a floating dtype. The result must not be written to."""
    match matrix:
        case Leaf():
            return matrix.fetch().to(dtype).reshape(matrix.shape)
        case Product():
            return _one(_multiplied(matrix, 1, dtype)[0], dtype)
        case Sum():
            return _summed(parts(matrix, Sum), dtype)
        case RowScaled(factor, inner):
            return dense(factor, dtype) * dense(inner, dtype)
        case Transposed(inner):
            return dense(inner, dtype).T
        case Rows(inner, index):
            return dense(inner, dtype)[index.places()]
        case Placed(inner, index):
            zeros = torch.zeros(matrix.shape, dtype=dtype)
            return zeros.index_copy_(0, index.places(), dense(inner, dtype))
        case Blocks():
            diagonal: torch.Tensor = torch.block_diag(*matrix.fetch().to(dtype))  # type: ignore[no-untyped-call]
            return diagonal
        case Identity(size):
            return torch.eye(size, dtype=dtype)


def _summed(terms: list[Matrix], dtype: torch.dtype) -> torch.Tensor:
    """Adds up in one buffer; a product is accumulated in the pass that adds it."""
    first, *rest = sorted(terms, key=lambda term: isinstance(term, Product))
    into = dense(first, dtype)
    for place, term in enumerate(rest):
        ours = place > 0 or not isinstance(first, Leaf | Transposed)  # no constant of the graph
        if isinstance(term, Product):
            left, right = (_one(f, dtype) for f in _multiplied(term, 2, dtype))
            into = into.addmm_(left, right) if ours else torch.addmm(into, left, right)
        else:
            value = dense(term, dtype)
            into = into.add_(value) if ours else into + value
    return into


def _multiplied(matrix: Product, left_over: int, dtype: torch.dtype) -> list[Factor]:
    """A product's factors, multiplied until so many are left, the cheapest neighbours first."""
    values: list[Factor] = [
        factor if isinstance(factor, Blocks) else dense(factor, dtype)
        for factor in parts(matrix, Product)
    ]
    while len(values) > left_over:
        costs = [_cost(*pair) for pair in pairwise(values)]
        at = costs.index(min(costs))
        values[at : at + 2] = [_times(values[at], values[at + 1], dtype)]
    return values


def _cost(left: Factor, right: Factor) -> float:
    blocks = max(m.blocks[0] if isinstance(m, Blocks) else 1 for m in (left, right))
    return left.shape[0] * left.shape[1] * right.shape[1] / blocks


def _times(left: Factor, right: Factor, dtype: torch.dtype) -> torch.Tensor:
    """One product; a block diagonal multiplies block by block."""
    if isinstance(left, Blocks):
        count, high, wide = left.blocks
        each = _one(right, dtype).reshape(count, wide, right.shape[1])
        return torch.bmm(left.fetch().to(dtype), each).reshape(count * high, right.shape[1])
    if isinstance(right, Blocks):
        count, high, wide = right.blocks
        each = left.reshape(left.shape[0], count, high).transpose(0, 1)
        done = torch.bmm(each, right.fetch().to(dtype))
        return done.transpose(0, 1).reshape(left.shape[0], count * wide)
    return left @ right


def _one(factor: Factor, dtype: torch.dtype) -> torch.Tensor:
    return dense(factor, dtype) if isinstance(factor, Blocks) else factor
