"""Evaluates matrix expressions, cheapest product first, in aten calls of whatever they hold.

Of tensors: `dense`, in float32 or wider. Of a graph's nodes: `recorded`, which a graph writes down.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Any

import torch

from lora_fx.algebra import matrix_expr as m
from lora_fx.algebra.index_expr import Index
from lora_fx.algebra.matrix_expr import Matrix

_aten = torch.ops.aten
_WEIGHT = ("weight",)


def dense(matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
    """Computes a matrix in a floating dtype. The result must not be written to."""
    value: torch.Tensor = _Evaluation(torch.empty(0, dtype=dtype)).of(matrix).seen(matrix.shape)
    return value


def weight_of_shape(shape: Sequence[int | None]) -> m.Leaf:
    """W, whose numbers are not known: a matrix of as many rows as the first size, where known."""
    rows, *columns = (size or 0 for size in shape)
    return m.Leaf((rows, prod(columns)), _WEIGHT, torch.Tensor)


def recorded(
    function: Callable[[Matrix], Matrix],
    shape: tuple[int, ...],
    values: Mapping[Hashable, torch.Tensor],
) -> Callable[..., Any]:
    """An expression in W as a function that a graph can record: of W and values, in aten calls.

    Args:
        function: from W to the expression.
        shape: of W, which is a matrix of as many rows as its first axis is long.
        values: the leaves, by key: the function takes what stands for them after W.
    """
    matrix = function(weight_of_shape(shape))

    def call(weight: Any, *given: Any) -> Any:
        pairs = zip(values.items(), given, strict=True)
        held = {key: _Held(node, tuple(value.shape)) for (key, value), node in pairs}
        run = _Evaluation(weight, held | {_WEIGHT: _Held(weight, shape)})
        return run.of(matrix).seen(shape)

    return call


@dataclass(frozen=True)
class _Held:
    """The numbers of a matrix, row by row, whatever axes they have."""

    value: Any
    shape: tuple[int, ...]

    def seen(self, shape: tuple[int, ...]) -> Any:
        return self.value if shape == self.shape else _aten.reshape.default(self.value, list(shape))


@dataclass(frozen=True, eq=False)
class _Evaluation:
    """One run: of tensors, in the dtype of one; or of what stands for the leaves, by key."""

    like: Any
    known: Mapping[Hashable, _Held] | None = None
    done: dict[int, tuple[Matrix, _Held]] = field(default_factory=dict)

    def of(self, matrix: Matrix) -> _Held:
        if self.known is None:  # what is computed may be written to, and is let go
            return self._made(matrix)
        if id(matrix) not in self.done:
            self.done[id(matrix)] = matrix, self._made(matrix)  # kept, or another has its id
        return self.done[id(matrix)][1]

    def _made(self, matrix: Matrix) -> _Held:
        shape = matrix.shape
        match matrix:
            case m.Leaf():
                return self._fetched(matrix)
            case m.Product():
                return self._times(*_grouped(m.parts(matrix, m.Product)))
            case m.Sum():
                return self._summed(m.parts(matrix, m.Sum))
            case m.DiagMul(m.Repeated(value, 1), inner):
                held = self.of(inner)
                return _Held(_aten.mul.Tensor(held.value, value), held.shape)
            case m.DiagMul(factor, inner):
                return _Held(_aten.mul.Tensor(self._flat(factor), self._flat(inner)), shape)
            case m.Transposed(inner):
                return _Held(_aten.t.default(self._flat(inner)), shape)
            case m.GatherRows(inner, index):
                rows = _aten.index_select.default(self._flat(inner), 0, self._places(index))
                return _Held(rows, shape)
            case m.ScatterRows(inner, index):
                zeros = _aten.new_zeros.default(self.like, list(shape))
                copy = _aten.index_copy if self.known else _aten.index_copy_
                rows = copy.default(zeros, 0, self._places(index), self._flat(inner))
                return _Held(rows, shape)
            case m.Replaced(inner, index, new):
                where = self._flat(inner), 0, self._places(index)
                return _Held(_aten.index_copy.default(*where, self._flat(new)), shape)
            case m.Kron(left, right):
                (high, wide), (rows, columns) = left.shape, right.shape
                one = self.of(left).seen((high, 1, wide, 1))
                each = _aten.mul.Tensor(one, self.of(right).seen((1, rows, 1, columns)))
                return _Held(each, (high, rows, wide, columns))
            case m.RowNorm(inner):
                norm = _aten.linalg_vector_norm.default(self._flat(inner), 2, [1], True)
                return _Held(norm, shape)
            case m.Quotient(left, right):
                return _Held(_aten.div.Tensor(self._flat(left), self._flat(right)), shape)
            case m.Reshaped(inner):
                return self.of(inner)
            case m.BlockDiag():
                each = self._blocks(matrix)
                each = _aten.transpose.int(each, 1, 2) if matrix.turned else each
                return _Held(_aten.block_diag.default(_aten.unbind.int(each)), shape)
            case m.Identity(size):
                ones = _aten.new_ones.default(self.like, [size])
                return _Held(_aten.diag_embed.default(ones), shape)
            case m.Repeated(value, size):
                return _Held(_aten.new_full.default(self.like, [size, 1], value), shape)

    def _flat(self, matrix: Matrix) -> Any:
        return self.of(matrix).seen(matrix.shape)

    def _fetched(self, leaf: m.Leaf | m.BlockDiag) -> _Held:
        if self.known is not None:
            return self.known[leaf.key]
        value = leaf.fetch().to(self.like.dtype)
        return _Held(value, tuple(value.shape))

    def _blocks(self, matrix: m.BlockDiag) -> Any:
        count, high, wide = matrix.blocks
        stored = (count, wide, high) if matrix.turned else matrix.blocks
        return self._fetched(matrix).seen(stored)

    def _places(self, index: Index) -> Any:
        return index.places() if self.known is None else self.known[index.key].value

    def _summed(self, terms: list[Matrix]) -> _Held:
        """Adds up in one buffer; a product is accumulated in the pass that adds it."""
        first, *rest = sorted(terms, key=lambda term: isinstance(self._factor(term)[1], m.Product))
        into, shape = self.of(first), first.shape
        # A constant of the graph is not written to, nor what is a view of one.
        ours = self.known is None and not isinstance(first, m.Leaf | m.Transposed | m.Reshaped)
        for term in rest:
            factor, chain = self._factor(term)
            pair = _grouped(m.parts(chain, m.Product)) if isinstance(chain, m.Product) else ()
            if pair and not any(isinstance(part, m.BlockDiag) for part in pair):
                add = _aten.addmm_ if ours else _aten.addmm
                alpha = {} if factor == 1 else {"alpha": factor}
                total = add.default(into.seen(shape), *map(self._flat, pair), **alpha)
                into = _Held(total, shape)
            else:
                add = _aten.add_ if ours else _aten.add
                into = _Held(add.Tensor(into.value, self.of(term).seen(into.shape)), into.shape)
            ours = self.known is None
        return into

    def _factor(self, term: Matrix) -> tuple[float, Matrix]:
        """The number that a product is multiplied with; a graph has a call of its own for it."""
        match term:
            case m.DiagMul(m.Repeated(value, 1), m.Product() as chain) if self.known is None:
                return value, chain
        return 1, term

    def _times(self, left: Matrix, right: Matrix) -> _Held:
        """One product; of a block diagonal, and of one matrix for all blocks, block by block."""
        rows, columns = left.shape[0], right.shape[1]
        match left, right:
            case m.BlockDiag(), _:
                count, high, wide = left.blocks
                axes = "cwh,cwm->chm" if left.turned else "chw,cwm->chm"
                pair = [self._blocks(left), self.of(right).seen((count, wide, columns))]
                return _Held(_aten.einsum.default(axes, pair), (count, high, columns))
            case _, m.BlockDiag():
                count, high, wide = right.blocks
                axes = "rch,cwh->rcw" if right.turned else "rch,chw->rcw"
                pair = [self.of(left).seen((rows, count, high)), self._blocks(right)]
                return _Held(_aten.einsum.default(axes, pair), (rows, count, wide))
        one, other = self._flat(left), self._flat(right)
        done = one @ other if self.known is None else _aten.mm.default(one, other)
        return _Held(done, (rows, columns))


def _grouped(chain: list[Matrix]) -> list[Matrix]:
    """A product's factors, multiplied until two are left, the cheapest neighbours first."""
    while len(chain) > 2:
        costs = [_cost(*pair) for pair in pairwise(chain)]
        at = costs.index(min(costs))
        chain[at : at + 2] = [m.Product(chain[at], chain[at + 1])]
    return chain


def _cost(left: Matrix, right: Matrix) -> float:
    blocks = max(part.blocks[0] if isinstance(part, m.BlockDiag) else 1 for part in (left, right))
    return left.shape[0] * left.shape[1] * right.shape[1] / blocks
