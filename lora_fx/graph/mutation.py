"""Mutation analysis: who reads memory after an in-place operator has written to it."""

from __future__ import annotations

from torch import fx

from lora_fx.graph.aliasing import Memory
from lora_fx.graph.ops import written_arguments


class Written:
    """The writes of a graph, and what they reach.

    Attributes:
        nodes: the calls that write, and every node whose memory, or memory it may share, is
            written to at some time.
        late: the nodes that write, or read what was written to since it was made.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes: set[fx.Node] = set()
        self.late: set[fx.Node] = set()
        self._calls: dict[fx.Node, list[fx.Node]] = {}
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
        calls = (call for call in self._calls.get(node, ()) if node < call < end)
        return next(calls, None)

    def is_shared(self, node: fx.Node) -> bool:
        """Whether memory that is written to has another name before this node."""
        return node in self._first and self._first[node] is not node

    def _note(self, call: fx.Node, group: list[fx.Node]) -> None:
        self.nodes.update(group)
        for node in group:
            self._calls.setdefault(node, []).append(call)
            self._first.setdefault(node, group[0])
            if node < call:
                self.late |= {user for user in node.users if user > call}


def written(graph: fx.Graph) -> set[fx.Node]:
    """Every node whose memory, or memory it may share, is written to by a call of the graph."""
    return Written(graph).nodes
