"""What an expression of a graph picks of one stored tensor: which places of it, in which order.

There is no table of views. The expression is run: on a tensor without memory, whose strides say
what a view is of, or else on the places' own numbers. What comes out are places only if nothing was
computed on the way, so a second run on numbers that mean nothing must pick the same.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from lora_fx.graph.lazy_tensor import get_unevaluated
from lora_fx.graph.ops import is_nested, mutates

_STEPS = 64  # nodes that an operand may be made of: what is more is no way to take a weight apart
_INDICES = 2**16  # entries of a tensor that picks
_NOTHING: Mapping[fx.Node, fx.Node] = MappingProxyType({})
_FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, NotImplementedError)


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
