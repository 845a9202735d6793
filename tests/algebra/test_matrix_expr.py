from __future__ import annotations

import torch

from lora_fx.algebra.index_expr import slice_of
from lora_fx.algebra.matrix_expr import (
    BlockDiag,
    DiagMul,
    GatherRows,
    Identity,
    Leaf,
    Product,
    ScatterRows,
    Sum,
    Transposed,
    parts,
)


def leaf(key: str, *shape: int) -> Leaf:
    return Leaf((shape[0], shape[1]), key, lambda: torch.ones(shape))


W, UP, DOWN = leaf("w", 5, 3), leaf("up", 5, 2), leaf("down", 2, 3)


def test_every_expression_knows_its_shape_without_being_computed() -> None:
    index = slice_of(5, slice(1, 4))
    assert Identity(5).shape == (5, 5)
    assert BlockDiag((2, 4, 3), "b", lambda: torch.ones(0)).shape == (8, 6)
    assert Transposed(W).shape == (3, 5)
    assert Product(UP, DOWN).shape == (5, 3)
    assert Sum(W, Product(UP, DOWN)).shape == (5, 3)
    assert DiagMul(leaf("s", 5, 1), W).shape == (5, 3)
    assert GatherRows(W, index).shape == (3, 3)
    assert ScatterRows(W, slice_of(9, slice(0, 5)), 9).shape == (9, 3)


def test_what_is_written_alike_is_equal_and_nothing_else() -> None:
    again = Leaf((5, 3), "w", lambda: torch.zeros(5, 3))
    assert Sum(W, Product(UP, DOWN)) == Sum(again, Product(UP, DOWN))
    assert hash(Sum(W, Product(UP, DOWN))) == hash(Sum(again, Product(UP, DOWN)))
    assert leaf("w", 3, 5) != W
    assert leaf("v", 5, 3) != W
    assert Sum(W, W) != Product(W, W)
    assert GatherRows(W, slice_of(5, slice(1, 4))) != GatherRows(W, slice_of(5, slice(0, 3)))


def test_parts_come_from_left_to_right_however_they_are_nested() -> None:
    a, b, c, d = (leaf(name, 3, 3) for name in "abcd")
    assert parts(Sum(Sum(a, b), Sum(c, d)), Sum) == [a, b, c, d]
    assert parts(Product(a, Product(Product(b, c), d)), Product) == [a, b, c, d]
    assert parts(Sum(a, Product(b, c)), Sum) == [a, Product(b, c)]
    assert parts(a, Sum) == [a]
