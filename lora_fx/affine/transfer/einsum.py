"""The transfer function of einsum with constants."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import fx

from lora_fx.affine.affine_map import Link
from lora_fx.affine.analysis import Analysis, Opaque, Value, result_dtype
from lora_fx.algebra.matrix_expr import BlockDiag, Matrix, product, transposed
from lora_fx.layers.matrix_products import listed


@dataclass(frozen=True)
class _Constant:
    """All constants of an einsum as one, without the labels that only they have.

    Attributes:
        own: its labels.
        sizes: of all labels of the constants.
        key: equal for two that are computed alike.
        fetch: its value.
    """

    own: str
    sizes: dict[str, int]
    key: Hashable
    fetch: Callable[[], torch.Tensor]


def einsum(analysis: Analysis, node: fx.Node) -> Value:
    """``bi,ri,or->bo`` with constants, such as a block diagonal ``...rk,rkc->...rc``."""
    equation, operands = str(node.args[0]).replace(" ", ""), _operands(node)
    inputs, _, output = equation.partition("->")
    labels = inputs.split(",")
    free = [n for n, value in enumerate(operands) if value not in analysis.constants.nodes]
    if len(free) != 1 or len(operands) != len(labels) or not output:
        return Opaque("an einsum of several activations, or one that names no output")
    of_x, x = labels.pop(free[0]), operands.pop(free[0])
    constant = _joined(analysis, labels, operands, of_x + output)
    if constant is None:
        return Opaque("an einsum of constants of unknown sizes, or of sizes that differ")
    own, sizes = constant.own, constant.sizes
    plan = _Einsum(own, *listed(x, own, _short(of_x), _short(output)))
    if not plan.is_layer:
        return Opaque("an einsum that sums over the batch, or has features out of order")
    split = tuple(sizes[label] for label in plan.inputs)
    is_matrix = len(own) == 2 and not plan.shared
    is_plain = len(split) == 1 and not plan.shared
    source = analysis.source(x, split[0], plan.after) if is_plain else analysis.whole_map_of(x)
    seen = None if source is None else source.layout.seen_as(split)
    if source is None or seen is None or seen.after != plan.after:
        return Opaque("an einsum of what is no map with these features")
    split = tuple(sizes[n] for n in plan.outputs)
    layout = replace(seen.turned(plan.order), split=split, after=plan.behind)
    ends = (plan.outputs[0], plan.inputs[0])
    matrix = _chain(analysis, labels, operands, ends) if is_matrix else None
    dtype = result_dtype(node, source.dtype)
    if is_matrix:  # as of any other product with it
        dtype = dtype or analysis.constants.dtype(operands[0])
    return source.then(node, matrix or plan.weight(constant), None, layout, dtype, Link.PRODUCT)


def _joined(
    analysis: Analysis, labels: list[str], operands: list[fx.Node], others: str
) -> _Constant | None:
    constants = analysis.constants
    sizes: dict[str, int] = {}
    for own, operand in zip(labels, operands, strict=True):
        shape = constants.shape(operand)
        if shape is None or len(shape) != len(own) or "." in own:
            return None
        if any(sizes.setdefault(n, size) != size for n, size in zip(own, shape, strict=True)):
            return None
    if len(operands) == 1:
        only = operands[0]
        return _Constant(labels[0], sizes, constants.key(only), lambda: constants.value(only))
    own = "".join(n for n in sizes if n in others)
    equation = f"{','.join(labels)}->{own}"
    key = (equation, *(constants.key(operand) for operand in operands))

    def fetch() -> torch.Tensor:
        return torch.einsum(equation, *(constants.value(operand) for operand in operands))

    return _Constant(own, sizes, key, fetch)


def _chain(
    analysis: Analysis, labels: list[str], operands: list[fx.Node], ends: tuple[str, str]
) -> Matrix | None:
    """Matrices that follow each other from one label to another, as their product; or None."""
    here, last = ends
    rest, found = list(zip(labels, operands, strict=True)), None
    while rest:
        ways = [pair for pair in rest if here in pair[0]]
        if len(ways) != 1 or len(set(ways[0][0])) != 2:
            return None
        rest.remove(ways[0])
        own, operand = ways[0]
        matrix = analysis.matrix(operand)
        if matrix is None:
            return None
        matrix = matrix if own[0] == here else transposed(matrix)
        found = matrix if found is None else product(found, matrix)
        here = own[1] if own[0] == here else own[0]
    return found if here == last else None


class _Einsum:
    """``(batch, shared, summed) x (shared, summed, new) -> (batch, shared, new)``."""

    def __init__(self, own: str, plain_x: str, plain_out: str) -> None:
        self.own = own
        self.inputs = [label for label in plain_x if label in own]
        self.outputs = [label for label in plain_out if label in own]
        self.shared = [label for label in self.inputs if label in self.outputs]
        batch = [label for label in plain_x if label not in own]
        kept = [label for label in plain_out if label not in own]
        self.after, self.behind = _behind(plain_x, own), _behind(plain_out, own)
        count = len(self.shared)
        self.order = tuple(batch.index(n) for n in kept if n in batch)
        self.is_layer = (
            sorted(batch) == sorted(kept)
            and (batch == kept or "." not in batch)
            and all(len(set(labels)) == len(labels) for labels in (own, plain_x, plain_out))
            and "." not in own
            and _together(plain_x, own)
            and _together(plain_out, own)
            and (self.after == self.behind or (len(own) == 2 and not self.shared))
            and "." not in plain_x[len(plain_x) - self.after :]
            and "." not in plain_out[len(plain_out) - self.behind :]
            and self.inputs[:count] == self.shared == self.outputs[:count]
            and set(own) <= {*self.inputs, *self.outputs}
        )

    def weight(self, constant: _Constant) -> Matrix:
        """The block diagonal: a block for each value of the shared labels."""
        count, sizes = len(self.shared), constant.sizes
        order = [self.own.index(n) for n in (*self.outputs, *self.inputs[count:])]
        blocks = (
            prod(sizes[n] for n in self.shared),
            prod(sizes[n] for n in self.outputs[count:]),
            prod(sizes[n] for n in self.inputs[count:]),
        )
        key = ("einsum", constant.key, tuple(order))
        return BlockDiag(blocks, key, lambda: constant.fetch().permute(order).reshape(blocks))


def _short(labels: str) -> str:
    return labels.replace("...", ".")


def _operands(node: fx.Node) -> list[Any]:
    rest = node.args[1:]
    return list(rest[0]) if len(rest) == 1 and isinstance(rest[0], list | tuple) else list(rest)


def _together(labels: str, own: str) -> bool:
    places = [place for place, label in enumerate(labels) if label in own]
    return bool(places) and places[-1] - places[0] == len(places) - 1


def _behind(labels: str, own: str) -> int:
    places = [place for place, label in enumerate(labels) if label in own]
    return len(labels) - 1 - places[-1] if places else 0
