"""The transfer function of einsum with one constant."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

from torch import fx

from lora_fx.affine.affine_map import Link
from lora_fx.affine.analysis import Analysis, Opaque, Value, result_dtype
from lora_fx.algebra.matrix_expr import BlockDiag, Matrix, transposed
from lora_fx.layers.matrix_products import listed


def einsum(analysis: Analysis, node: fx.Node) -> Value:
    """A sum of products with one constant, such as a block diagonal ``...rk,rkc->...rc``."""
    equation, operands = str(node.args[0]).replace(" ", ""), _operands(node)
    inputs, _, output = equation.partition("->")
    labels = inputs.split(",")
    if len(operands) != 2 or len(labels) != 2 or not output:
        return Opaque("an einsum of other than two operands")
    constant = 1 if operands[1] in analysis.constants.nodes else 0
    own, of_x = labels[constant], labels[1 - constant]
    plan = _Einsum(own, *listed(operands[1 - constant], own, _short(of_x), _short(output)))
    known = operands[constant] in analysis.constants.nodes
    shape = analysis.constants.shape(operands[constant]) if known else None
    if not plan.is_layer or shape is None:
        return Opaque("an einsum that sums over the batch, or has features out of order")
    sizes = dict(zip(own, shape, strict=True))
    split = tuple(sizes[label] for label in plan.inputs)
    x = operands[1 - constant]
    is_matrix = len(own) == 2 and not plan.shared
    source = analysis.source(x, split[0], plan.after) if is_matrix else analysis.whole_map_of(x)
    seen = None if source is None else source.layout.seen_as(split)
    if source is None or seen is None or seen.after != plan.after:
        return Opaque("an einsum of what is no map with these features")
    split = tuple(sizes[n] for n in plan.outputs)
    layout = replace(seen.turned(plan.order), split=split, after=plan.behind)
    matrix = analysis.matrix(operands[constant]) if is_matrix else None
    weight: Matrix = plan.weight(analysis, operands[constant], sizes)
    if matrix is not None:
        weight = matrix if own[0] == plan.outputs[0] else transposed(matrix)
    dtype = result_dtype(node, source.dtype)
    if is_matrix:  # as of any other product with it
        dtype = dtype or analysis.constants.dtype(operands[constant])
    return source.then(node, weight, None, layout, dtype, Link.PRODUCT)


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

    def weight(self, analysis: Analysis, node: fx.Node, sizes: dict[str, int]) -> Matrix:
        """The block diagonal: a block for each value of the shared labels."""
        count = len(self.shared)
        order = [self.own.index(n) for n in (*self.outputs, *self.inputs[count:])]
        blocks = (
            prod(sizes[n] for n in self.shared),
            prod(sizes[n] for n in self.outputs[count:]),
            prod(sizes[n] for n in self.inputs[count:]),
        )
        key = ("einsum", analysis.constants.key(node), tuple(order))
        return BlockDiag(
            blocks, key, lambda: analysis.constants.value(node).permute(order).reshape(blocks)
        )


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
