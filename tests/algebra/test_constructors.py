"""Expressions equal what they stand for, however they are built."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_fx.algebra.evaluate import dense
from lora_fx.algebra.index_expr import slice_of
from lora_fx.algebra.matrix_expr import (
    BlockDiag,
    Identity,
    Kron,
    Leaf,
    Matrix,
    Product,
    Quotient,
    Replaced,
    RowNorm,
    Sum,
    columns_scaled,
    number,
    placed,
    product,
    repeated,
    reshaped,
    rows,
    scaled,
    signed,
    total,
    transposed,
)

Pair = tuple[Matrix, torch.Tensor]
OPERATIONS = (
    *("product", "sum", "scaled", "number", "rows", "placed", "transposed", "blocks"),
    *("kron", "reshaped", "columns", "replaced", "lengths"),
)


def leaf(rows: int, columns: int, seed: int) -> Pair:
    make = torch.Generator().manual_seed(100 * seed + 10 * rows + columns)
    value = torch.randn(rows, columns, generator=make, dtype=torch.float64)
    return Leaf((rows, columns), ("leaf", seed, rows, columns), lambda: value), value


def block(count: int, seed: int) -> Pair:
    """A block diagonal of as many columns as asked for, in blocks of (2, 1)."""
    make = torch.Generator().manual_seed(seed)
    value = torch.randn(count, 2, 1, generator=make, dtype=torch.float64)
    return BlockDiag((count, 2, 1), ("blocks", seed, count), lambda: value), torch.block_diag(
        *value
    )


def step(pair: Pair, operation: str, seed: int) -> Pair:
    """The same operation on an expression and on the matrix that it stands for."""
    matrix, exact = pair
    high, wide = matrix.shape
    size = 1 + seed % 5
    if operation == "product":
        left, value = leaf(size, high, seed)
        return product(left, matrix), value @ exact
    if operation == "sum":
        other, value = leaf(high, wide, seed)
        both = total(matrix, other) if seed % 2 else total(other, matrix)
        assert both is not None
        return both, exact + value
    if operation == "scaled":
        factor, value = leaf(high, 1, seed)
        return scaled(factor, matrix), value * exact
    if operation == "number":
        return signed(matrix, -0.5), -0.5 * exact
    cut = slice(seed % high, None, 1 + seed % 2)
    if operation == "rows":
        return rows(matrix, slice_of(high, cut)), exact[cut]
    if operation == "placed":
        zeros = torch.zeros(high + size, wide, dtype=torch.float64)
        zeros[size:] = exact
        return placed(matrix, slice_of(high + size, slice(size, None)), high + size), zeros
    if operation == "kron":
        other, value = leaf(1 + seed % 2, 2, seed)
        return Kron(matrix, other), torch.kron(exact.contiguous(), value)
    if operation == "reshaped":
        return reshaped(matrix, high * wide), exact.reshape(-1, 1)
    if operation == "columns":
        factor, value = leaf(wide, 1, seed)
        return columns_scaled(matrix, factor), exact * value.T
    if operation == "replaced":
        other, value = leaf(len(range(high)[cut]), wide, seed)
        made = exact.clone()
        made[cut] = value
        return Replaced(matrix, slice_of(high, cut), other), made
    if operation == "lengths":
        lengths, value = RowNorm(Sum(matrix, matrix)), 2 * exact.norm(dim=1, keepdim=True)
        other, divisor = leaf(high, 1, seed)
        return Quotient(lengths, other), value / divisor
    if operation == "blocks":
        left, value = block(high, seed)
        return product(left, matrix), value @ exact
    return transposed(matrix), exact.T


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 99)), max_size=8),
    st.sampled_from((leaf(5, 3, 0), block(3, 1), (Identity(4), torch.eye(4, dtype=torch.float64)))),
)
def test_expressions_equal_what_they_stand_for(steps: list[tuple[str, int]], pair: Pair) -> None:
    for operation, seed in steps:
        if pair[0].shape[0] < 40:
            pair = step(pair, operation, seed)
    matrix, exact = pair
    assert matrix.shape == tuple(exact.shape)
    got = dense(matrix, torch.float64)
    assert (got - exact).norm() <= 1e-12 * (1 + exact.norm())
    assert (1.1 * got - exact).norm() > 1e-12 * (1 + exact.norm()) or exact.norm() == 0


def test_identities_and_zeros_vanish() -> None:
    weight, _ = leaf(5, 3, 0)
    assert product(Identity(5), weight) is weight
    assert product(weight, Identity(3)) is weight
    assert total(None, weight) is weight
    assert total(weight, None) is weight
    assert total(None, None) is None
    assert signed(weight, 1) is weight
    assert transposed(transposed(weight)) is weight
    assert transposed(Identity(3)) == Identity(3)


def test_what_acts_on_rows_acts_on_the_left_factor() -> None:
    (up, _), (down, _) = leaf(5, 2, 0), leaf(2, 3, 1)
    index = slice_of(5, slice(1, 4))
    for matrix in (
        scaled(number(2), Product(up, down)),
        rows(Product(up, down), index),
        placed(Product(up, down), slice_of(9, slice(0, 5)), 9),
        product(up, product(down, leaf(3, 3, 2)[0])),
    ):
        assert isinstance(matrix, Product)
    assert isinstance(transposed(Sum(up, up)), Sum)


def test_numbers_and_columns() -> None:
    assert torch.equal(dense(number(2.5), torch.float64), torch.tensor([[2.5]]).double())
    assert torch.equal(dense(repeated(2.5, 3), torch.float64), torch.full((3, 1), 2.5).double())
    assert repeated(2.5, 3) == repeated(2.5, 3) != repeated(2.0, 3)
