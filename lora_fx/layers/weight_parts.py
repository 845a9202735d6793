"""Slices of a weight that a layer reads: rows and columns of a packed projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import fx

from lora_fx.graph.lazy_tensor import get_unevaluated
from lora_fx.layers.picked_elements import Grid, calls_of, expression_of, grid_of

Places = range | tuple[int, ...]  # in order; a range where they follow each other at equal steps
Read = tuple[fx.Node, fx.Node]  # who reads, and the node that it reads

_NOTHING: Mapping[fx.Node, fx.Node] = MappingProxyType({})


class Part(NamedTuple):
    """What an operand is of one stored tensor.

    Attributes:
        source: the ``get_attr`` node of the tensor.
        rows: along its first axis; None is all of them, in order.
        columns: along its second axis, likewise.
        turned: whether the operand is that transposed.
        calls: what picks, in order; empty where the operand is the tensor itself.
        reads: who of them reads the tensor, or what an adapter made of it.
    """

    source: fx.Node
    rows: Places | None = None
    columns: Places | None = None
    turned: bool = False
    calls: tuple[fx.Node, ...] = ()
    reads: tuple[Read, ...] = ()

    def behind(self, matrix: fx.Node, moves: Sequence[fx.Node]) -> Part:
        """The same part where calls that move it as a whole, to give it a batch, follow."""
        if not moves:
            return self
        reads = self.reads or ((moves[0], matrix),)
        return self._replace(calls=(*self.calls, *moves), reads=reads)


def part_of(
    gm: fx.GraphModule, value: object, made: Mapping[fx.Node, fx.Node] = _NOTHING
) -> Part | None:
    """The stored tensor behind an operand, and which part of it that is.

    Whatever only picks and moves is seen through: chunks, slices, views, transposes, indices.

    Args:
        gm: the graph.
        value: an operand of a layer: its weight, or its bias.
        made: operands that adapters made -> the stored weight below.

    Returns:
        None if it is no node, or computed, or no rows and columns of one tensor.
    """
    if not isinstance(value, fx.Node):
        return None
    if value in made or value.op == "get_attr":
        return Part(made.get(value, value))
    picked = picked_from(gm, value, made)
    found = _read(picked.shape, picked.grid) if picked else None
    if picked is None or found is None:
        return None
    return Part(picked.source, *found, picked.calls, picked.reads)


class Picked(NamedTuple):
    """Any places of one stored tensor: source, calls and reads as in `Part`."""

    source: fx.Node
    calls: tuple[fx.Node, ...]
    reads: tuple[Read, ...]
    shape: tuple[int, ...]
    grid: Grid


def picked_from(
    gm: fx.GraphModule, value: fx.Node, made: Mapping[fx.Node, fx.Node] = _NOTHING
) -> Picked | None:
    """What a call's result picks of one stored tensor, or None if it is no such thing."""
    nodes = calls_of(value, made)
    leaves = {node: made.get(node, node) for node in nodes if node in made or node.op == "get_attr"}
    stored = {node: at for node, at in leaves.items() if _is_floating(gm, at)}
    if len({str(at.target) for at in stored.values()}) != 1:
        return None
    expression = expression_of(gm, nodes, stored)
    grid = grid_of(expression) if expression else None
    if expression is None or grid is None:
        return None
    calls = tuple(node for node in nodes if node not in leaves)
    reads = [(call, at) for call in calls for at in call.all_input_nodes if at in stored]
    return Picked(next(iter(stored.values())), calls, tuple(reads), expression.shape, grid)


def _is_floating(gm: fx.GraphModule, node: fx.Node) -> bool:
    dtype = getattr(get_unevaluated(gm, str(node.target)), "dtype", None)
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def _read(shape: tuple[int, ...], grid: Grid) -> tuple[Places | None, Places | None, bool] | None:
    """Rows, columns and whether it is turned, if a grid is whole places of both axes."""
    if len(grid.offsets) != len(shape):
        return None
    if len(shape) == 1:
        return _places(grid.origin + grid.offsets[0], shape[0]), None, False
    size = prod(shape[2:])  # of a kernel, which stays whole
    for axis in range(2, len(shape)):
        step = prod(shape[axis + 1 :])
        if not torch.equal(grid.offsets[axis], torch.arange(shape[axis]) * step):
            return None
    first, second, *kernel = grid.offsets
    for turned in (False, True) if not kernel else (False,):
        down, along = (second, first) if turned else (first, second)
        found = _both(shape, size, grid.origin, down, along)
        if found is not None:
            return *found, turned
    return None


def _both(
    shape: tuple[int, ...], size: int, origin: int, down: torch.Tensor, along: torch.Tensor
) -> tuple[Places | None, Places | None] | None:
    row = shape[1] * size
    column = origin % row + along
    is_whole = not (down % row).any() and not (column % size).any()
    if not is_whole or int(column.min()) < 0 or int(column.max()) >= row:
        return None
    return _places(origin // row + down // row, shape[0]), _places(column // size, shape[1])


def _places(found: torch.Tensor, size: int) -> Places | None:
    listed: Sequence[int] = found.tolist()
    step = listed[1] - listed[0] if len(listed) > 1 else 1
    evenly = range(listed[0], listed[0] + step * len(listed), step) if step > 0 else None
    if evenly is None or list(evenly) != list(listed):
        return tuple(listed)
    return None if evenly == range(size) else range(evenly[0], evenly[-1] + 1, step)
