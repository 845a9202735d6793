"""Slices of a weight that a layer reads: rows and columns of a packed projection.

There is no table of views. What picks of a stored tensor is run: on a tensor without memory, whose
strides say what a view is of, or else on the places' own numbers. What comes out are places only if
nothing was computed on the way, so a second run on numbers that mean nothing must pick the same.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.node import map_aggregate

from lora_fx.graph.lazy_tensor import get_unevaluated
from lora_fx.graph.ops import is_nested, mutates

Places = range | tuple[int, ...]  # in order; a range where they follow each other at equal steps
Read = tuple[fx.Node, fx.Node]  # who reads, and the node that it reads

_STEPS = 64  # nodes that an operand may be made of: what is more is no way to take a weight apart
_INDICES = 2**16  # entries of a tensor that picks
_FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, NotImplementedError)
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


@dataclass(frozen=True)
class _Ref:
    """The value of an earlier step, in the arguments of a later one."""

    place: int


@dataclass(frozen=True)
class _Step:
    """One call, or a tensor that picks."""

    op: str
    target: Any
    args: Any = ()
    kwargs: Any = ()


@dataclass(frozen=True)
class Expression:
    """Calls on one tensor, without the graph that they are of: equal for all layers of a kind.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
        key: the calls, written down.
        steps: the calls; the tensor is the value before the first.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    key: str
    steps: tuple[_Step, ...] = field(compare=False)


@dataclass(frozen=True)
class Grid:
    """Places of a tensor, row-major: origin + one offset along each axis."""

    origin: int
    offsets: tuple[torch.Tensor, ...]


def calls_of(
    value: fx.Node, leaves: Mapping[fx.Node, fx.Node] = _NOTHING, most: int = _STEPS
) -> list[fx.Node]:
    """What a value is computed from, itself last, if that is stored tensors alone; else nothing.

    Args:
        value: a node.
        leaves: nodes that stand for a stored tensor, besides those that fetch one.
        most: how many nodes are looked at.
    """
    found, pending = {value}, [value]
    while pending:
        node = pending.pop()
        if node in leaves or node.op == "get_attr":
            continue
        if node.op not in ("call_function", "call_method") or _is_unsteady(node):
            return []
        fresh = [source for source in node.all_input_nodes if source not in found]
        found.update(fresh)
        pending.extend(fresh)
        if len(found) > most:
            return []
    return sorted(found)


def expression_of(
    gm: fx.GraphModule, calls: Sequence[fx.Node], stored: Mapping[fx.Node, fx.Node]
) -> Expression | None:
    """Writes down what calls make of one tensor; None if another takes part that does not pick.

    Args:
        gm: the graph.
        calls: of `calls_of`.
        stored: the nodes among them that stand for the tensor -> the ``get_attr`` node.
    """
    value = get_unevaluated(gm, str(next(iter(stored.values())).target))
    refs: dict[fx.Node, _Ref] = dict.fromkeys(stored, _Ref(0))
    steps: list[_Step] = []
    for node in calls:
        if node in stored:
            continue
        step = _picking(gm, node) if node.op == "get_attr" else _written(node, refs)
        if step is None:
            return None
        steps.append(step)
        refs[node] = _Ref(len(steps))
    key = "; ".join(_shown(step) for step in steps)
    return Expression(tuple(value.shape), value.dtype, key, tuple(steps))


@functools.lru_cache(maxsize=1024)
def grid_of(expression: Expression) -> Grid | None:
    """The places that an expression picks, or None if it computes."""
    base = torch.empty(expression.shape, dtype=expression.dtype, device="meta")
    with torch.no_grad():
        result = _run(expression, base)
        if isinstance(result, torch.Tensor):
            if result.dtype != base.dtype or not result.numel():
                return None
            if result.untyped_storage()._cdata == base.untyped_storage()._cdata:
                steps = zip(result.shape, result.stride(), strict=True)
                offsets = tuple(torch.arange(size) * stride for size, stride in steps)
                return Grid(int(result.storage_offset()), offsets)
        return _counted(expression)


def _counted(expression: Expression) -> Grid | None:
    """The places by their own numbers, for what makes new memory of what it picks."""
    size = prod(expression.shape)
    places = _run(expression, torch.arange(size).reshape(expression.shape))
    if not isinstance(places, torch.Tensor) or places.dtype != torch.int64 or not places.numel():
        return None
    secret = torch.randint(-(2**62), 2**62, (size,), generator=torch.Generator().manual_seed(0))
    again = _run(expression, secret.reshape(expression.shape))
    if places.min() < 0 or places.max() >= size or not torch.equal(secret[places], again):
        return None
    origin = places.flatten()[0]
    offsets = [
        places.movedim(axis, 0).reshape(size, -1)[:, 0] - origin
        for axis, size in enumerate(places.shape)
    ]
    total = origin
    for axis, offset in enumerate(offsets):
        total = total + offset.reshape(-1, *[1] * (places.ndim - 1 - axis))
    return Grid(int(origin), tuple(offsets)) if torch.equal(total, places) else None


def _run(expression: Expression, base: torch.Tensor) -> Any:
    values: list[Any] = [base]

    def known(argument: Any) -> Any:
        return values[argument.place] if isinstance(argument, _Ref) else argument

    try:
        for step in expression.steps:
            args, kwargs = map_aggregate((step.args, step.kwargs), known)
            if step.op == "get_attr":
                values.append(step.target.to(base.device))
            elif step.op == "call_method":
                values.append(getattr(args[0], step.target)(*args[1:], **dict(kwargs)))
            else:
                values.append(step.target(*args, **dict(kwargs)))
    except _FAILURES:
        return None
    return values[-1]


def _is_unsteady(node: fx.Node) -> bool:
    """Whether a call writes, or may give something else the next time or elsewhere."""
    if isinstance(node.target, torch._ops.OpOverload):
        return _is_unsteady_operator(node.target)
    return mutates(node) or is_nested(node) or not node.all_input_nodes


@functools.cache
def _is_unsteady_operator(target: torch._ops.OpOverload) -> bool:
    return target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags


def _picking(gm: fx.GraphModule, node: fx.Node) -> _Step | None:
    value = get_unevaluated(gm, str(node.target))
    if not isinstance(value, torch.Tensor) or value.is_meta:
        return None
    is_index = not value.is_floating_point() and not value.is_complex()
    return _Step("get_attr", value.cpu()) if is_index and value.numel() <= _INDICES else None


def _written(node: fx.Node, refs: Mapping[fx.Node, _Ref]) -> _Step:
    known: Any = refs.__getitem__
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), known)
    return _Step(node.op, node.target, args, kwargs)


def _shown(step: _Step) -> str:
    if step.op == "get_attr":
        return f"{step.target.dtype} {step.target.tolist()}"
    return f"{step.op} {step.target!r} {step.args!r} {step.kwargs!r}"
