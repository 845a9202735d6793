"""A matrix read as a base plus products."""

from __future__ import annotations

import pytest
import torch

from lora_fx.algebra.evaluate import dense
from lora_fx.algebra.index_expr import slice_of
from lora_fx.algebra.low_rank import (
    NotLowRankError,
    additive,
    beside,
    blocks_beside,
    column_beside,
    factors_beside,
)
from lora_fx.algebra.matrix_expr import (
    BlockDiag,
    Leaf,
    Matrix,
    Replaced,
    Sum,
    columns_scaled,
    normed,
    number,
    placed,
    product,
    reshaped,
    scaled,
    signed,
    transposed,
)


def leaf(name: str, rows: int, columns: int) -> Leaf:
    value = torch.randn(rows, columns, generator=torch.Generator().manual_seed(len(name)))
    return Leaf((rows, columns), name, lambda: value)


W, A, B = leaf("base", 10, 6), leaf("a", 2, 6), leaf("bb", 10, 2)
CASES: dict[str, Matrix] = {
    "a product": product(B, A),
    "scaled": scaled(number(1.5), product(B, A)),
    "subtracted": signed(product(B, A), -1),
    "two": Sum(product(B, A), product(leaf("other b", 10, 3), leaf("other a", 3, 6))),
    "three factors": product(product(B, leaf("mid", 2, 4)), leaf("wide", 4, 6)),
    "some rows": placed(product(leaf("part", 4, 2), A), slice_of(10, slice(3, 7)), 10),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("first", [True, False])
def test_factors_multiply_to_what_is_added(name: str, first: bool) -> None:
    delta = CASES[name]
    down, up = factors_beside(W, Sum(W, delta) if first else Sum(delta, W))
    wanted = dense(delta, torch.float32)
    torch.testing.assert_close(up @ down, wanted)
    assert not torch.allclose(1.1 * up @ down, wanted)
    assert down.shape[0] == (5 if name == "two" else 2)


REFUSED: dict[str, tuple[Matrix, str]] = {
    "the base is scaled": (Sum(scaled(number(2.0), W), product(B, A)), "scaled"),
    "the base is scaled as well": (Sum(W, Sum(scaled(number(2.0), W), product(B, A))), "scaled"),
    "no factors": (Sum(W, leaf("delta", 10, 6)), "no product"),
    "full rank": (Sum(W, product(leaf("b", 10, 6), leaf("aa", 6, 6))), "rank 6"),
    "more than that": (Sum(W, product(leaf("b", 10, 7), leaf("aa", 7, 6))), "rank 7"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_low_rank_update_says_why(name: str) -> None:
    whole, reason = REFUSED[name]
    with pytest.raises(NotLowRankError, match=reason):
        factors_beside(W, whole)


def test_what_is_added_to_a_bias() -> None:
    own, more = leaf("own", 10, 1), leaf("more", 10, 1)
    added = column_beside(own, Sum(own, more))
    assert added is not None
    assert torch.equal(added, more.fetch().reshape(-1))
    assert column_beside(own, own) is None
    assert column_beside(None, None) is None
    with pytest.raises(NotLowRankError, match="scaled"):
        column_beside(own, more)


ROW, COL, LENGTH = leaf("row", 10, 1), leaf("columns", 6, 1), leaf("length", 10, 1)
PRODUCT = scaled(number(1.5), product(B, A))
SCALED = {
    "W + diag(g) W": (Sum(W, Sum(scaled(ROW, W), PRODUCT)), 1 + ROW.fetch(), None),
    "rows": (scaled(ROW, Sum(W, PRODUCT)), ROW.fetch(), None),
    "columns": (columns_scaled(Sum(W, PRODUCT), COL), None, COL.fetch()),
    "both": (scaled(ROW, columns_scaled(Sum(PRODUCT, W), COL)), ROW.fetch(), COL.fetch()),
    "columns of rows": (
        columns_scaled(scaled(ROW, Sum(W, PRODUCT)), COL),
        ROW.fetch(),
        COL.fetch(),
    ),
    "twice": (scaled(number(2.0), scaled(ROW, Sum(W, PRODUCT))), 2 * ROW.fetch(), None),
    "lengths": (
        normed(LENGTH, Sum(W, PRODUCT)),
        LENGTH.fetch() / dense(Sum(W, PRODUCT), torch.float32).norm(dim=1, keepdim=True),
        None,
    ),
}


@pytest.mark.parametrize("name", SCALED)
def test_what_scales_the_base_is_a_row_and_a_column(name: str) -> None:
    whole, row, col = SCALED[name]
    found = beside(W, whole)
    for one, exact in ((found.row, row), (found.col, col)):
        assert (one is None) == (exact is None)
        if one is not None and exact is not None:
            torch.testing.assert_close(dense(one, torch.float32), exact)
    base = dense(W, torch.float32) * (1 if row is None else row)
    again = base + sum(dense(term, torch.float32) for term in found.added)
    again = again if col is None else again * col.T
    torch.testing.assert_close(again, dense(whole, torch.float32))
    with pytest.raises(NotLowRankError, match="the base weight itself is scaled"):
        factors_beside(W, whole)


@pytest.mark.parametrize("whole", [product(W, leaf("square", 6, 6)), product(B, A)])
def test_a_base_that_is_moved_is_not_beside_anything(whole: Matrix) -> None:
    with pytest.raises(NotLowRankError, match="scaled or moved"):
        beside(W, whole)


@pytest.mark.parametrize("turned", [False, True])
def test_rows_that_take_the_place_of_the_base_s_are_added_to_it(turned: bool) -> None:
    where, new = slice_of(10, slice(1, 8, 3)), leaf("some rows", 3, 6)
    base = leaf("turned", 6, 10) if turned else W
    made = Replaced(transposed(base) if turned else base, where, new)
    whole = transposed(made) if turned else made
    assert torch.equal(dense(made, torch.float32)[[1, 4, 7]], new.fetch())
    down, up = factors_beside(base, additive(base, whole))
    torch.testing.assert_close(base.fetch() + up @ down, dense(whole, torch.float32))
    assert 3 in up.shape


def test_blocks_are_read_as_they_are_held() -> None:
    """Those that lie on their side would be read as others."""
    left, right, experts = torch.randn(2, 5, 3), torch.randn(6, 6), leaf("experts", 2, 30)
    held = BlockDiag((2, 5, 3), "blocks", lambda: left)
    factors = Leaf((6, 6), "right", lambda: right)
    found = blocks_beside(experts, Sum(experts, reshaped(product(held, factors), 2)))
    assert torch.equal(found[0], left)
    assert torch.equal(found[1], right.view(2, 3, 6))
    assert [t.shape for t in blocks_beside(W, Sum(W, product(B, A)))] == [(10, 2), (2, 6)]
    turned = BlockDiag((2, 5, 3), "blocks", lambda: left.mT, turned=True)
    with pytest.raises(NotLowRankError, match="no product for each block"):
        blocks_beside(experts, Sum(experts, reshaped(product(turned, factors), 2)))
