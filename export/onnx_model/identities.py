"""Removes Identity nodes of an ONNX model, where no output needs them."""

from __future__ import annotations

import onnx_ir as ir


class DropIdentities(ir.passes.InPlacePass):
    """Lets the readers of an Identity read what that reads.

    Before -> after: ``y = Identity(x); z = Tanh(y)  ->  z = Tanh(x)``. What gives an output of a
    graph stays where x is another, an input, a weight, or computed outside of that graph, as a
    branch may hand on (onnx_ir's own pass leaves such a branch without its output).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the graph and its branches."""
        idle = [node for node in model.graph.all_nodes() if node.op_type == "Identity"]
        gone = [node for node in idle if not node.domain and _drop(node)]
        return ir.passes.PassResult(model, modified=bool(gone))


def _drop(node: ir.Node) -> bool:
    x, y, graph = node.inputs[0], node.outputs[0], node.graph
    is_output, name = y.is_graph_output(), y.name
    producer = None if x is None else x.producer()
    if x is None or graph is None or (is_output and (producer is None or producer.graph != graph)):
        return False
    if is_output and x.is_graph_output():  # which has a name already
        return False
    x.shape, x.type = x.shape or y.shape, x.type or y.type
    y.replace_all_uses_with(x, replace_graph_outputs=True)
    if is_output:
        x.name = name
    graph.remove(node, safe=True)
    return True
