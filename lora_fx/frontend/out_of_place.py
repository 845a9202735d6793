"""The out-of-place form of in-place operators: the value that a write would leave behind."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from lora_fx.graph.memory_views import Call, assigned, viewed
from lora_fx.graph.ops import aten, draws, function_name, in_place, inplace_place, same_sizes

Overload = torch._ops.OpOverload
_BY_OPERATOR = {
    "iadd": operator.add,
    "isub": operator.sub,
    "imul": operator.mul,
    "itruediv": operator.truediv,
}


class NoTwinError(Exception):
    """A write that has no value of its own."""


def twin(call: Call, write: fx.Node, into: fx.Node) -> fx.Node:
    """What ``into`` holds after a write, as a new node.

    Raises:
        NoTwinError: no operator gives it, or its shape would be another.
    """
    if write.op == "call_function" and isinstance(write.target, Overload):
        value = _of_operator(call, write, into)
    elif write.target is operator.setitem:
        value = assigned(call, into, *write.args[1:3])
    elif not _is_tensor(into):
        raise NoTwinError
    else:
        value = _of_python(call, write, into)
    if value is None:
        raise NoTwinError
    old, new = into.meta.get("val"), value.meta.get("val")
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        if not same_sizes(tuple(old.shape), tuple(new.shape)):
            raise NoTwinError
        return value if old.dtype == new.dtype else call(aten.to.dtype, value, old.dtype)
    return value


def _of_operator(call: Call, write: fx.Node, into: fx.Node) -> fx.Node | None:
    if write.target is aten.copy_.default:
        value: Any = write.args[1]
        return value if _is_of_module(write) else _copied(call, into, value)
    target = _functional(write.target)
    if target is None:
        return None
    kwargs = {name: value for name, value in write.kwargs.items() if value is not into}
    return call(target, *write.args, **kwargs)


def _copied(call: Call, into: fx.Node, value: fx.Node) -> fx.Node:
    """What `aten.copy` gives, but for the dtype, in operators that torch has gradients of."""
    old, new = (node.meta.get("val") for node in (into, value))
    if new is None or not isinstance(old, torch.Tensor) or not old.is_contiguous():
        return call(aten.copy.default, into, value)
    if not same_sizes(tuple(old.shape), tuple(new.shape)):
        value = call(aten.expand_as.default, value, into)
    return call(aten.clone.default, value, memory_format=torch.contiguous_format)


def _is_of_module(write: fx.Node) -> bool:
    """Whether the tracer wrote down a module that works in place as what it gives, and a copy."""
    into, value = write.args[:2]
    return isinstance(value, fx.Node) and value.op == "call_module" and value.args == (into,)


@cache
def _functional(target: Overload) -> Overload | None:
    """The overload that returns what another writes: the same arguments, but for ``out``."""
    name = target._schema.name.split("::")[-1]
    packet = getattr(getattr(torch.ops, target.namespace), name.removesuffix("_"), None)
    wanted = [str(a.type) for a in target._schema.arguments if not a.is_out]
    for overload in _overloads(packet):
        schema = overload._schema
        same = [str(a.type) for a in schema.arguments] == wanted
        if same and not schema.is_mutable and len(schema.returns) == 1:
            return overload
    return None


def _overloads(packet: Any) -> Iterator[Overload]:
    if isinstance(packet, torch._ops.OpOverloadPacket):
        names = packet.overloads()  # type: ignore[no-untyped-call]
        yield from (getattr(packet, name) for name in names)


def _of_python(call: Call, write: fx.Node, into: fx.Node) -> fx.Node | None:
    if draws(write):
        return None  # ``y.bernoulli()`` draws with y's values for probabilities
    if in_place(write):
        args, place = list(write.args), inplace_place(write.target)
        if place is not None and place < len(args):
            args[place] = False
        kwargs = {k: v for k, v in write.kwargs.items() if k != "inplace"}
        return call(write.target, *args, **kwargs)
    target = _counterpart(write)
    if target is None or write.kwargs.get("out") is not None:
        return None
    value = call(target, *write.args, **write.kwargs)
    operands = [n for n in write.all_input_nodes if n is not into]
    if target is aten.copy.default or not operands:
        return value
    return call("type_as", value, into)


def _counterpart(write: fx.Node) -> Any:
    if write.op == "call_function" and function_name(write.target) in _BY_OPERATOR:
        return _BY_OPERATOR[function_name(write.target)]
    name = str(write.target) if write.op == "call_method" else function_name(write.target)
    name = name.removesuffix("_")
    if name == "copy":
        return aten.copy.default
    if write.op == "call_method" and hasattr(torch.Tensor, name):
        return name
    is_python = not isinstance(write.target, torch._ops.OpOverloadPacket)
    places = (torch, F) if write.op == "call_function" and is_python else ()
    found = (getattr(place, name, None) for place in places)
    return next((f for f in found if f is not None), None) or getattr(aten, name, None)


def _is_tensor(node: fx.Node) -> bool:
    """Whether a node is known to be a tensor: ``+=`` on a number makes a new number."""
    value = node.meta.get("val")
    if value is not None:
        return isinstance(value, torch.Tensor)
    if node.op == "call_module" or isinstance(node.target, Overload):
        return True
    if (source := viewed(node)) is not None:
        return _is_tensor(source)
    name = str(node.target) if node.op == "call_method" else function_name(node.target)
    if getattr(node.target, "__module__", "") == "_operator":  # of numbers too
        return any(map(_is_tensor, node.all_input_nodes))
    return _gives_tensor(name.removesuffix("_"))


def _gives_tensor(name: str) -> bool:
    returns = [o._schema.returns for o in _overloads(getattr(aten, name, None))]
    return any([str(r.type) for r in rs] == ["Tensor"] for rs in returns)
