"""Expressions in W as a graph computes them: the numbers of `dense`, in aten calls."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from lora_fx.algebra.evaluate import dense, recorded
from lora_fx.algebra.index_expr import slice_of
from lora_fx.algebra.matrix_expr import (
    BlockDiag,
    Identity,
    Index,
    Kron,
    Matrix,
    Quotient,
    Replaced,
    Sum,
    columns_scaled,
    constant,
    exchanged,
    holding,
    leaves,
    normed,
    number,
    placed,
    product,
    repeated,
    reshaped,
    rows,
    scaled,
    signed,
    transposed,
)

MAKE = torch.Generator().manual_seed(2)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=MAKE, dtype=torch.float64)


W, UP, DOWN, COLUMN, FEW = noise(6, 4), noise(6, 2), noise(2, 4), noise(6, 1), noise(2)
LEFT, RIGHT, BLOCKS, SQUARE = noise(3, 2), noise(2, 2), noise(3, 2, 2), noise(4, 4)
PLACES = slice_of(6, slice(1, 6, 3))
ROWS = noise(2, 4)


def block(turned: bool = False) -> Matrix:
    made: Matrix = BlockDiag((3, 2, 2), "blocks", lambda: BLOCKS)
    return transposed(made) if turned else made


def on_rows(weight: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    made = into.clone()
    made[[1, 4]] = weight
    return made


DIAGONAL, SWAP = torch.block_diag(*BLOCKS), noise(4, 6)
CASES: dict[str, tuple[Callable[[Matrix], Matrix], torch.Tensor]] = {
    "product": (lambda w: Sum(w, product(constant(UP), constant(DOWN))), W + UP @ DOWN),
    "scaled": (lambda w: signed(w, -2.5), -2.5 * W),
    "rows scaled": (lambda w: scaled(constant(COLUMN), w), COLUMN * W),
    "kron": (lambda w: Sum(w, Kron(constant(LEFT), constant(RIGHT))), W + torch.kron(LEFT, RIGHT)),
    "kron on its side": (
        lambda w: Sum(w, transposed(Kron(transposed(constant(LEFT)), constant(RIGHT)))),
        W + torch.kron(LEFT, RIGHT.T.contiguous()),
    ),
    "normed": (lambda w: normed(constant(COLUMN), w), COLUMN * W / W.norm(dim=1, keepdim=True)),
    "quotient": (
        lambda w: scaled(Quotient(repeated(1.0, 6), constant(COLUMN)), w),
        W / COLUMN,
    ),
    "columns, two of each factor": (
        lambda w: columns_scaled(w, constant(FEW)),
        W * FEW.repeat_interleave(2),
    ),
    "reshaped": (
        lambda w: reshaped(product(reshaped(w, 12), constant(RIGHT)), 6),
        (W.reshape(12, 2) @ RIGHT).reshape(6, 4),
    ),
    "blocks of rows": (lambda w: product(block(), w), DIAGONAL @ W),
    "blocks of rows, turned": (lambda w: product(block(True), w), DIAGONAL.T @ W),
    "blocks of columns": (
        lambda w: transposed(product(transposed(w), block())),
        (W.T @ DIAGONAL).T,
    ),
    "blocks of columns, turned": (
        lambda w: transposed(product(transposed(w), block(True))),
        DIAGONAL @ W,
    ),
    "blocks in a sum": (
        lambda w: Sum(w, product(block(), product(constant(UP), constant(DOWN)))),
        W + DIAGONAL @ UP @ DOWN,
    ),
    "blocks alone": (
        lambda w: product(Sum(product(w, constant(SWAP)), block()), w),
        (W @ SWAP + DIAGONAL) @ W,
    ),
    "blocks alone, turned": (
        lambda w: product(Sum(product(w, constant(SWAP)), block(True)), w),
        (W @ SWAP + DIAGONAL.T) @ W,
    ),
    "replaced": (lambda w: Replaced(w, PLACES, constant(ROWS)), on_rows(ROWS, W)),
    "placed": (
        lambda w: Sum(w, placed(constant(ROWS), PLACES, 6)),
        W + on_rows(ROWS, torch.zeros(6, 4, dtype=torch.float64)),
    ),
    "rows": (lambda w: placed(rows(w, PLACES), PLACES, 6), on_rows(W[[1, 4]], 0 * W)),
    "identity": (lambda w: product(w, Sum(Identity(4), constant(SQUARE))), W + W @ SQUARE),
    "a number": (lambda w: scaled(Sum(number(1.0), number(2.0)), w), 3 * W),
}  # fmt: skip


def values_of(function: Callable[[Matrix], Matrix]) -> dict[object, torch.Tensor]:
    base = constant(W)
    found = {leaf.key: leaf for leaf in leaves(function(base)) if leaf != base}
    return {k: n.places() if isinstance(n, Index) else n.fetch() for k, n in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_graph_computes_what_the_expression_says(name: str) -> None:
    function, exact = CASES[name]
    values, graph = values_of(function), fx.Graph()
    tracer = GraphAppendingTracer(graph)
    names = ["w", *(f"value_{place}" for place in range(len(values)))]
    proxies = [fx.Proxy(graph.placeholder(name), tracer) for name in names]
    graph.output(recorded(function, (6, 4), values)(*proxies).node)
    graph.lint()
    module = fx.GraphModule({}, graph)
    before = [value.clone() for value in (W, *values.values())]
    found, whole = module(W, *values.values()), dense(function(constant(W)), torch.float64)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole, exact, rtol=1e-12, atol=1e-12)
    assert (1.1 * found - exact).norm() > 1e-2
    assert all(map(torch.equal, before, (W, *values.values()))), "nothing is written to"
    calls = [node.target for node in graph.nodes if node.op == "call_function"]
    assert all(isinstance(target, torch._ops.OpOverload) for target in calls)


def test_an_axis_that_nobody_needs_flat_stays() -> None:
    """W of a kernel and a value of the same axes are summed as they are: one call."""
    value, graph = noise(6, 2, 2), fx.Graph()
    tracer = GraphAppendingTracer(graph)
    w, given = (fx.Proxy(graph.placeholder(name), tracer) for name in ("w", "value"))
    leaf = constant(value)
    recorded(lambda weight: Sum(weight, leaf), (6, 2, 2), {leaf.key: value})(w, given)
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [
        torch.ops.aten.add.Tensor
    ]


def test_what_is_in_an_expression_twice_is_computed_once() -> None:
    graph = fx.Graph()
    tracer = GraphAppendingTracer(graph)
    w, length, down, up = (fx.Proxy(graph.placeholder(n), tracer) for n in ("w", "n", "d", "u"))
    leaf = {name: constant(value) for name, value in (("n", COLUMN), ("u", UP), ("d", DOWN))}
    values = {leaf["n"].key: COLUMN, leaf["u"].key: UP, leaf["d"].key: DOWN}

    def dora(weight: Matrix) -> Matrix:
        return normed(leaf["n"], Sum(weight, product(leaf["u"], leaf["d"])))

    recorded(dora, (6, 4), values)(w, length, up, down)
    found = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    names = ["addmm.default", "linalg_vector_norm.default", "div.Tensor", "mul.Tensor"]
    assert found == [f"aten.{name}" for name in names]


def test_leaves_hold_other_tensors() -> None:
    whole = Sum(product(block(True), constant(UP)), Replaced(constant(UP), PLACES, constant(ROWS)))
    other = {id(UP): 2 * UP}

    def change(leaf: object) -> object:
        return holding(leaf, other[id(UP)]) if leaf == constant(UP) else leaf  # type: ignore[arg-type]

    keys = [leaf.key for leaf in leaves(whole)]
    changed = [leaf.key for leaf in leaves(exchanged(whole, change))]
    assert [old == new for old, new in zip(keys, changed, strict=True)] == [
        True, False, False, True, True,
    ]  # fmt: skip


@pytest.mark.parametrize("count", range(2, 13, 2))
def test_what_is_let_go_of_is_not_taken_for_what_is_made_later(count: int) -> None:
    """Of a long product, pieces are made and let go: each has to be told from the others."""
    vectors = [constant(noise(4, 1)) for _ in range(count)]

    def turned(weight: Matrix) -> Matrix:
        for vector in vectors:
            shift = product(product(signed(weight, -2.0), vector), transposed(vector))
            weight = Sum(weight, shift)
        return weight

    def reflected(weight: Matrix) -> Matrix:
        return product(weight, product(turned(Identity(4)), turned(Identity(4))))

    values = {vector.key: vector.fetch() for vector in vectors}
    got = recorded(reflected, tuple(W.shape), values)(W, *values.values())
    exact = dense(reflected(constant(W)), torch.float64)
    torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)
