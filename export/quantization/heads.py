"""Which layers of a file are heads: what they give is an output, after a few steps of its own."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

_CACHE = "present."  # what keys and values are called that the next call reads
_NORMS = {
    "GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization",
    "SimplifiedLayerNormalization",
}  # fmt: skip
# What moves, picks or casts its first input; the others say how.
_MOVES = {
    "Cast", "Expand", "Gather", "GatherElements", "GatherND", "Pad", "Reshape", "Slice", "Split",
    "Squeeze", "Tile", "Transpose", "Unsqueeze",
}  # fmt: skip
BRANCH = ".lora_"


def heads_in(model: ir.Model, layers: Collection[ir.Node]) -> set[ir.Node]:
    """The layers from which one value alone goes to an output: logits, labels, a pooled vector.

    A bias, a bend, moves of axes and an adapter's branch are the head's own. A residual sum, a norm
    or a cache between the two, and the layer is one of the base.

    Args:
        model: the model.
        layers: the nodes of its layers.
    """
    waiting = [v for v in model.graph.outputs if not str(v.name).startswith(_CACHE)]
    seen: set[ir.Node] = set()
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        if inner := _given_by(node):
            waiting += inner
            continue
        sources = _sources(node)
        if node not in layers and node.op_type not in _NORMS and len(sources) == 1:
            waiting += sources
    return seen & set(layers)


def _given_by(node: ir.Node) -> list[ir.Value]:
    """What the branches or the body of a node give."""
    graphs = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    return [v for graph in graphs for v in graph.outputs if not str(v.name).startswith(_CACHE)]


def _sources(node: ir.Node) -> list[ir.Value]:
    """The values that a node's result is made of, without constants and branches."""
    given = node.inputs[:1] if node.op_type in _MOVES else node.inputs
    values = [value for value in given if value is not None and not value.is_initializer()]
    values = [v for v in values if (p := v.producer()) is None or p.op_type != "Constant"]
    own = [value for value in values if not _is_branch(value)]
    return own if own else values


def _is_branch(value: ir.Value) -> bool:
    """Whether a value is an adapter's: made with what may be overridden, or is called after it."""
    node = value.producer()
    given = () if node is None else node.inputs
    return any(
        BRANCH in str(v.name) or (v.is_initializer() and v.is_graph_input())
        for v in given
        if v is not None
    )
