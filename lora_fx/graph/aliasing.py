"""Which values of a graph may share memory, and who reads it after a write in place.

What torch.export has traced says so itself: tensors that share memory share their storage there.
For other nodes the schema of the operator says which of its results may be views.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree as pytree

from lora_fx.graph.ops import FACTS, aten, function_name, in_place, mutates, written_arguments

# May return what they are given, or a view of it, and their schemas do not say so.
_SILENT = {
    *("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "dropout1d"),
    *("dropout2d", "dropout3d", "einsum", "pad", "conj_physical", "interpolate", "upsample"),
}
_PASSING = (nn.Identity, nn.Flatten, nn.Unflatten, _DropoutNd)


class Memory:
    """The nodes of a graph, grouped by memory that they may share.

    Args:
        graph: its nodes are looked at once; later ones are told to `add`.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._parents: dict[Hashable, Hashable] = {}
        self._groups: dict[Hashable, list[fx.Node]] = {}
        for node in graph.nodes:
            self.add(node)

    def add(self, node: fx.Node) -> None:
        """Takes a node in; those that it reads are known."""
        keys = _own_keys(node)
        if node.op != "output" and "val" not in node.meta:
            keys += [node, *(n for n in shared_inputs(node) if n in self._parents)]
        if not keys:
            return  # a number
        self._parents.setdefault(node, node)
        whole = self._find(node)
        group = self._groups.setdefault(whole, [])
        group.append(node)
        for other in {self._find(self._parents.setdefault(key, key)) for key in keys} - {whole}:
            self._parents[other] = whole
            group += self._groups.pop(other, [])

    def group(self, node: fx.Node) -> list[fx.Node]:
        """A node and all that may share its memory, in order; none that were erased."""
        members = self._groups.get(self._find(node), []) if node in self._parents else []
        return sorted(member for member in members if not member._erased)

    def _find(self, key: Hashable) -> Hashable:
        while self._parents[key] is not key and self._parents[key] != key:
            self._parents[key] = self._parents[self._parents[key]]
            key = self._parents[key]
        return key


def shared_inputs(node: fx.Node) -> Iterator[fx.Node]:
    """What a node may return, or a view of it."""
    if _makes_new(node):
        return
    if not isinstance(node.target, torch._ops.OpOverload):
        yield from written_arguments(node) or node.all_input_nodes
        return
    for place, argument in enumerate(node.target._schema.arguments):
        given = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
        silent = function_name(node.target) in _SILENT
        if argument.alias_info is not None or (silent and place == 0):
            leaves = pytree.tree_leaves(given, is_leaf=lambda leaf: isinstance(leaf, fx.Node))
            yield from (leaf for leaf in leaves if isinstance(leaf, fx.Node))


def storages(value: Any) -> list[int]:
    """The storages of what a node was traced with."""
    leaves = pytree.tree_leaves(value)
    return [_bare(v).untyped_storage()._cdata for v in leaves if isinstance(v, torch.Tensor)]


def _bare(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor under ``torch.vmap`` is a view of."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def _own_keys(node: fx.Node) -> list[Hashable]:
    found = set(storages(node.meta.get("val")))
    if node.op == "get_attr":
        return [str(node.target), *found]
    return list(found) if len(found) == 1 else []  # several results: whoever takes one says which


def _makes_new(node: fx.Node) -> bool:
    """Whether the result is memory that nothing else has."""
    if node.op in ("placeholder", "get_attr"):
        return True
    if node.op == "call_module":
        module = node.graph.owning_module
        called = module.get_submodule(str(node.target)) if module is not None else None
        is_known = type(called).__module__.startswith("torch.nn.modules")
        return is_known and not isinstance(called, _PASSING) and not mutates(node)
    if isinstance(node.target, torch._ops.OpOverload) or in_place(node):
        return False
    if node.target is getattr:
        return node.args[1] in FACTS
    name = str(node.target) if node.op == "call_method" else function_name(node.target)
    return name not in _SILENT and _is_new_by_schema(name)


def _is_new_by_schema(name: str) -> bool:
    packet = getattr(aten, name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return name in ("truediv", "floordiv")
    names = packet.overloads()  # type: ignore[no-untyped-call]
    schemas = [getattr(packet, name)._schema for name in names]
    own = [s for s in schemas if not s.is_mutable]
    return bool(own) and all(r.alias_info is None for s in own for r in s.returns)


class Written:
    """The writes of a graph, and what they reach.

    Attributes:
        nodes: the calls that write, and every node whose memory, or memory it may share, is
            written to at some time.
        late: the nodes that write, or read what was written to since it was made.
        calls: by such a node, the calls that write to its memory.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes: set[fx.Node] = set()
        self.late: set[fx.Node] = set()
        self.calls: dict[fx.Node, list[fx.Node]] = {}
        self._end = graph.output_node()
        self._first: dict[fx.Node, fx.Node] = {}
        calls = [node for node in graph.nodes if written_arguments(node)]
        memory = Memory(graph) if calls else None
        for call in calls:
            assert memory is not None
            self.late.add(call)
            self.nodes.add(call)
            for into in written_arguments(call):
                self._note(call, memory.group(into))

    def between(self, node: fx.Node, end: fx.Node) -> fx.Node | None:
        """The first write into a node's memory after it was made and before another node."""
        calls = (call for call in self.calls.get(node, ()) if node < call < end)
        return next(calls, None)

    def is_shared(self, node: fx.Node) -> bool:
        """Whether memory that is written to has another name before this node."""
        return node in self._first and self._first[node] is not node

    def needed(self) -> set[fx.Node]:
        """All nodes that an output depends on, by what they return or by what they write."""
        found: set[fx.Node] = set()
        pending = [self._end]
        while pending:
            node = pending.pop()
            if node not in found:
                found.add(node)
                pending += [*node.all_input_nodes, *self.calls.get(node, ())]
        return found

    def _note(self, call: fx.Node, group: list[fx.Node]) -> None:
        self.nodes.update(group)
        for node in group:
            self.calls.setdefault(node, []).append(call)
            self._first.setdefault(node, group[0])
            if node < call:
                self.late |= {user for user in node.users if user > call}


def written(graph: fx.Graph) -> set[fx.Node]:
    """Every node whose memory, or memory it may share, is written to by a call of the graph."""
    return Written(graph).nodes
