"""Writes in place, said without writing.

``y = zeros(...); y.view(-1, 15)[:, mask] = v`` leaves no node that holds what y is in the end. If
y is new memory that nothing else shares, the write becomes a value of its own, `index_put`, and
everyone who reads y afterwards reads that. Whatever may share memory in other ways stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lora_fx.ops import aten, op_name
from lora_fx.written import FRESH

Overload = torch._ops.OpOverload
_ARITHMETIC = {"add_", "sub_", "mul_", "div_"}


def functionalise(graph: fx.Graph) -> None:
    """Rewrites writes into new memory, in a graph of aten operators, in place."""
    for node in list(graph.nodes):
        if _is_write(node):
            _without_writing(node)


def _is_write(node: fx.Node) -> bool:
    is_aten = isinstance(node.target, Overload) and node.target.namespace == "aten"
    return is_aten and node.target._schema.is_mutable and _twin(node) is not None  # type: ignore[union-attr]


def _without_writing(write: fx.Node) -> None:
    """Replaces one write by the value it makes, seen through every view of the same memory."""
    path = _views(write.args[0])
    family = _family(path[0]) if path else set()
    if not path or not _is_safe(write, family):
        return
    graph, root = write.graph, path[0]
    with graph.inserting_before(write):
        value = graph.call_function(_twin(write), write.args, write.kwargs)  # type: ignore[arg-type]
        _describe(value, write, path[-1])
        made = [value]
        for outer, inner in zip(reversed(path[:-1]), reversed(path[1:]), strict=True):
            made.append(_put_back(outer, inner, made[-1]))
        # Views are said again from the root, so that the next write finds all of them.
        now = {root: made[-1]}
        for view in sorted(family - {root}):
            is_read = any(user > write for user in view.users)
            if view < write and (is_read or view is path[-1]):
                _again(view, now)
    for old, new in now.items():
        for user in [user for user in old.users if user > write]:
            user.replace_input_with(old, new)
    write.replace_all_uses_with(now[path[-1]])
    graph.erase_node(write)
    for node in reversed([*made, *list(now.values())[1:]]):
        if not node.users:
            graph.erase_node(node)


def _views(node: Any) -> list[fx.Node]:
    """From new memory to a view of it, step by step; empty if it is not known to be new."""
    path: list[Any] = [node] if isinstance(node, fx.Node) else []
    while path and op_name(path[0]) in _BACK and _is_aten(path[0]):
        path.insert(0, path[0].args[0])
    return path if path and op_name(path[0]) in FRESH and _is_aten(path[0]) else []


def _family(root: fx.Node) -> set[fx.Node]:
    """All views of some memory that can be said again."""
    family, pending = {root}, [root]
    while pending:
        for user in pending.pop().users:
            if op_name(user) in _BACK and _is_aten(user):
                family.add(user)
                pending.append(user)
    return family


def _is_safe(write: fx.Node, family: set[fx.Node]) -> bool:
    """Whether nobody who may share the memory is read after the write, and no dtype is lost."""
    for user in _sharing(family, write):
        if any(reader > write for reader in user.users):
            return False
    return op_name(write) not in _ARITHMETIC or _keeps_dtype(write)


def _sharing(family: set[fx.Node], write: fx.Node) -> set[fx.Node]:
    """What may share the memory before the write and is no view that can be said again."""
    found: set[fx.Node] = set()
    pending = list(family)
    while pending:
        for user in pending.pop().users:
            fresh = op_name(user) in FRESH or user in found or user in family
            if user < write and not fresh:
                found.add(user)
                pending.append(user)
    return found


def _keeps_dtype(write: fx.Node) -> bool:
    values = [node.meta.get("val") for node in write.all_input_nodes]
    if not all(isinstance(value, torch.Tensor) for value in values):
        return False
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    promoted = tensors[0].dtype
    for value in tensors[1:]:
        promoted = torch.promote_types(promoted, value.dtype)
    whole = op_name(write) != "div_" and all(type(n) is int for n in write.args[1:2])
    return promoted == tensors[0].dtype and (promoted.is_floating_point or whole)


def _twin(node: fx.Node) -> Overload | None:
    """The operator that returns what another writes."""
    target = node.target
    assert isinstance(target, Overload)
    name = target._schema.name.split("::")[-1]
    packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
    twin = getattr(packet, target._overloadname, None)
    if twin is None or twin._schema.is_mutable:
        return None
    same = len(twin._schema.arguments) == len(target._schema.arguments)
    return twin if same else None


def _is_aten(node: fx.Node) -> bool:
    return isinstance(node.target, Overload)


def _describe(node: fx.Node, write: fx.Node, written: fx.Node) -> None:
    node.meta.update(write.meta)
    if "val" in written.meta:
        node.meta["val"] = written.meta["val"]


def _put_back(outer: fx.Node, inner: fx.Node, value: fx.Node) -> fx.Node:
    """What ``outer`` holds once its view ``inner`` holds a value."""
    target, arguments = _BACK[op_name(inner)]
    made: fx.Node = outer.graph.call_function(target, arguments(outer, inner, value))
    _describe(made, inner, outer)
    return made


def _again(view: fx.Node, now: dict[fx.Node, fx.Node]) -> None:
    """Says a view again, of what its memory holds now."""
    source = view.args[0]
    assert isinstance(source, fx.Node)
    if source not in now:
        _again(source, now)
    made = view.graph.call_function(view.target, (now[source], *view.args[1:]), view.kwargs)  # type: ignore[arg-type]
    made.meta.update(view.meta)
    now[view] = made


def _same(outer: fx.Node, inner: fx.Node, value: fx.Node) -> tuple[Any, ...]:
    return (value,)


def _scattered(outer: fx.Node, inner: fx.Node, value: fx.Node) -> tuple[Any, ...]:
    return (outer, value, *inner.args[1:])


def _turned(outer: fx.Node, inner: fx.Node, value: fx.Node) -> tuple[Any, ...]:
    return (value, *inner.args[1:])


def _beside(outer: fx.Node, inner: fx.Node, value: fx.Node) -> tuple[Any, ...]:
    return (value, outer)


# A view, and what undoes it.
_BACK: dict[str, tuple[Any, Any]] = {
    "alias": (aten.alias.default, _same),
    "detach": (aten.alias.default, _same),
    "view": (aten.view_as.default, _beside),
    "view_as": (aten.view_as.default, _beside),
    "slice": (aten.slice_scatter.default, _scattered),
    "select": (aten.select_scatter.default, _scattered),
    "transpose": (aten.transpose.int, _turned),
}
