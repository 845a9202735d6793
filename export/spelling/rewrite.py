"""The base of all passes that say a subgraph in other ONNX operators, and what rewrites nodes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


class Spelling(ir.passes.InPlacePass):
    """Says the same in other operators, wherever it is said in the plain ones.

    Attributes:
        since: the opset that it needs.
        what: of the report: what was chosen, and how often.
        count: how often it was chosen.
    """

    since = 1
    what = ""

    def __init__(self) -> None:
        self.count = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the model."""
        for node in list(model.graph):
            if node.graph is not None:  # it may have gone with another
                self.count += self.respell(node)
        return ir.passes.PassResult(model, bool(self.count))

    def respell(self, node: ir.Node) -> bool:
        """Changes what ends in a node, if it can be said otherwise, and says whether it was."""
        raise NotImplementedError


def producer(value: ir.Value | None, kinds: str | Collection[str]) -> ir.Node | None:
    """The node that gives a value, if it is of a kind of plain ONNX."""
    node = value.producer() if value is not None else None
    wanted = (kinds,) if isinstance(kinds, str) else kinds
    is_plain = node is not None and node.domain in ("", "ai.onnx")
    return node if node is not None and is_plain and node.op_type in wanted else None


def number(value: ir.Value | None) -> float | None:
    """The one number that a constant holds everywhere."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None or value is None or value.is_graph_input() or tensor.size != 1:
        return None
    return float(tensor.numpy().item())


def put(node: ir.Node, nodes: Sequence[ir.Node], result: ir.Value) -> None:
    """Puts nodes in the place of one, under its module's name."""
    old, graph = node.outputs[0], node.graph
    assert isinstance(graph, ir.Graph)
    for new in nodes:
        new.metadata_props.update(node.metadata_props)
    graph.insert_before(node, nodes)
    take_over(old, result)
    graph.remove(node, safe=True)


def constant(array: np.ndarray[Any, Any] | np.generic) -> ir.Node:
    """What gives an array."""
    return ir.node("Constant", [], {"value": ir.tensor(np.asarray(array))})


def shaped(kind: str, value: ir.Value | None, numbers: Sequence[int]) -> list[ir.Node]:
    """A Reshape to sizes, or an Unsqueeze that adds axes at places, behind what gives these."""
    given = constant(np.array(numbers, np.int64))
    return [given, ir.node(kind, [value, given.outputs[0]])]


def take_over(old: ir.Value, result: ir.Value) -> None:
    """Lets everybody read another value, under the name of the old one."""
    result.type, result.shape = old.type, old.shape
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    result.name, old.name = old.name, f"{old.name}_before"
