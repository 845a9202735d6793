from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_fx.weights import Identity, Leaf, Product, RowScaled, Sum, product, total

SIZES = st.integers(1, 6)


def leaf(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float64) -> Leaf:
    value = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return Leaf((rows, columns), lambda: value)


@settings(deadline=None)
@given(SIZES, SIZES, SIZES, st.integers(0, 99))
def test_expressions_equal_what_they_stand_for(out: int, rank: int, into: int, seed: int) -> None:
    weight, up, down = leaf(out, into, seed), leaf(out, rank, seed + 1), leaf(rank, into, seed + 2)
    factor = leaf(out, 1, seed + 3)
    expression = RowScaled(factor, Sum(weight, Product(up, down)))
    exact = factor.fetch() * (weight.fetch() + up.fetch() @ down.fetch())
    assert expression.shape == (out, into)
    torch.testing.assert_close(expression.dense(torch.float64), exact)
    dropped = factor.fetch() * weight.fetch()
    assert not torch.allclose(expression.dense(torch.float64), dropped, rtol=1e-9, atol=1e-12)


def test_identities_and_zeros_vanish() -> None:
    weight = leaf(5, 3, 0)
    assert product(Identity(5), weight) is weight
    assert product(weight, Identity(3)) is weight
    assert total(None, weight) is weight
    assert total(weight, None) is weight
    assert total(None, None) is None
    assert torch.equal(Identity(3).dense(torch.float32), torch.eye(3))


def test_a_sum_writes_to_neither_of_its_parts() -> None:
    weight, up, down = leaf(5, 3, 0), leaf(5, 2, 1), leaf(2, 3, 2)
    before = weight.fetch().clone()
    for expression in (total(weight, Product(up, down)), total(Product(up, down), weight)):
        assert expression is not None
        expression.dense(torch.float64)
        assert torch.equal(weight.fetch(), before)


def test_half_precision_is_widened_before_it_is_computed_with() -> None:
    up, down = leaf(5, 2, 1, torch.float16), leaf(2, 3, 2, torch.bfloat16)
    exact = up.fetch().float() @ down.fetch().float()
    assert torch.equal(Product(up, down).dense(torch.float32), exact)
