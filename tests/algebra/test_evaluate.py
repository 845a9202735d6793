from __future__ import annotations

from itertools import permutations

import torch

from lora_fx.algebra.evaluate import dense
from lora_fx.algebra.matrix_expr import (
    BlockDiag,
    Identity,
    Leaf,
    Matrix,
    Product,
    Sum,
    Transposed,
    product,
    total,
)

MAKE = torch.Generator().manual_seed(0)


def leaf(key: str, rows: int, columns: int, dtype: torch.dtype = torch.float64) -> Leaf:
    value = torch.randn(rows, columns, generator=MAKE).to(dtype)
    return Leaf((rows, columns), key, lambda: value)


def test_a_sum_writes_to_none_of_its_parts() -> None:
    weight, up, down = leaf("w", 5, 3), leaf("u", 5, 2), leaf("d", 2, 3)
    terms: tuple[Matrix, ...] = (weight, Transposed(leaf("t", 3, 5)), Product(up, down))
    exact = sum(dense(term, torch.float64) for term in terms)
    before = [dense(term, torch.float64).clone() for term in terms]
    for first, second, third in permutations(terms):
        got = dense(Sum(Sum(first, second), third), torch.float64)
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
        after = [dense(term, torch.float64) for term in terms]
        assert all(map(torch.equal, before, after))


def test_a_matrix_that_is_summed_twice_stays_as_it_is() -> None:
    weight = leaf("w", 5, 3)
    before = weight.fetch().clone()
    assert torch.equal(dense(Sum(weight, weight), torch.float64), 2 * before)
    assert torch.equal(weight.fetch(), before)


def test_half_precision_is_widened_before_it_is_computed_with() -> None:
    up, down = leaf("u", 5, 2, torch.float16), leaf("d", 2, 3, torch.bfloat16)
    exact = up.fetch().float() @ down.fetch().float()
    assert torch.equal(dense(Product(up, down), torch.float32), exact)
    narrow = (up.fetch().bfloat16() @ down.fetch()).float()
    assert not torch.equal(narrow, exact)


def test_identities() -> None:
    assert torch.equal(dense(Identity(3), torch.float32), torch.eye(3))


def test_factors_are_multiplied_the_cheapest_first() -> None:
    """(500, 2) @ (2, 500) @ (500, 1): from the left it would make a matrix of 500 by 500."""
    up, down, x = leaf("u", 500, 2), leaf("d", 2, 500), leaf("x", 500, 1)
    largest = 0
    real = torch.Tensor.__matmul__

    def matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        made = real(left, right)
        largest = max(largest, made.numel())
        return made

    torch.Tensor.__matmul__ = matmul  # type: ignore[method-assign]
    try:
        got = dense(product(product(up, down), x), torch.float64)
    finally:
        torch.Tensor.__matmul__ = real  # type: ignore[method-assign]
    assert largest == 500
    torch.testing.assert_close(got, up.fetch() @ (down.fetch() @ x.fetch()))


def test_block_diagonals_multiply_block_by_block() -> None:
    value = torch.randn(2, 4, 3, generator=MAKE).double()
    other = torch.randn(3, 2, 4, generator=MAKE).double()
    one = BlockDiag((2, 4, 3), "one", lambda: value)
    two = BlockDiag((3, 2, 4), "two", lambda: other)
    up, down = leaf("u", 5, 8), leaf("d", 6, 5)
    dense_one, dense_two = torch.block_diag(*value), torch.block_diag(*other)
    cases = {
        Product(up, one): up.fetch() @ dense_one,
        Product(one, down): dense_one @ down.fetch(),
        Product(one, two): dense_one @ dense_two,
        Product(Product(up, one), down): up.fetch() @ dense_one @ down.fetch(),
    }
    for expression, exact in cases.items():
        torch.testing.assert_close(dense(expression, torch.float64), exact)  # type: ignore[arg-type]
    twice = total(one, Product(leaf("a", 8, 2), leaf("b", 2, 6)))
    assert twice is not None
    assert not torch.equal(dense(twice, torch.float64), dense_one)
