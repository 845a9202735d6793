"""Calls of a layer that a slot would miss: a fused operator reads its weight, or a copy of that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from lora_fx.export.rewriting.file_layers import FileLayer
from lora_fx.export.rewriting.layer_names import Paths
from lora_fx.export.rewriting.weight_reads import readers

_LOOKS_UP = {"EmbedLayerNormalization", "Gather", "GatherBlockQuantized"}
_OF_SHAPE = {"Shape", "Size"}
_HANDS_ON = {"DequantizeLinear", "Reshape"}  # where numbers are what they were, in other places


def missed_calls(layers: Sequence[FileLayer], chosen: Paths) -> dict[str, str]:
    """Layers that the file calls elsewhere too, in a way that no slot stands beside.

    What reads a table otherwise than by rows is another layer, that is tied to it, and so is a
    lookup in the weight of a linear layer.

    Args:
        layers: of the file.
        chosen: those that are asked about.

    Returns:
        Path -> the node that calls it.
    """
    nodes = {layer.node for layer in layers}
    found = {}
    for path, calls in chosen.items():
        weights = dict.fromkeys(call.weight for call in calls)
        others = [n for weight in weights for n in _read_by(weight) if n not in nodes]
        mine = [n for n in others if _is_call(n, calls[0])] + list(_packed(calls[0]))
        if mine:
            found[path] = f"{mine[0].op_type} {mine[0].name}".strip()
    return found


def _read_by(weight: ir.Value) -> Iterator[ir.Node]:
    for node, place in readers(weight):
        if node.op_type in _HANDS_ON and place == 0:
            yield from _read_by(node.outputs[0])
        elif node.op_type not in _OF_SHAPE:
            yield node


def _is_call(node: ir.Node, layer: FileLayer) -> bool:
    return (node.op_type in _LOOKS_UP) == (layer.kind == "embedding")


def _packed(layer: FileLayer) -> Iterator[ir.Node]:
    """Who reads a weight (in, out) in a wider one, as fused attention does: ``[q | k | v]``."""
    own, graph = layer.weight, layer.node.graph
    if (
        layer.kind != "linear"
        or not layer.turned
        or layer.quantised
        or not isinstance(graph, ir.Graph)
    ):
        return
    into, out = own.shape.numpy()  # type: ignore[union-attr]
    for other in graph.initializers.values():
        shape = other.shape
        if shape is None or len(shape) != 2 or other.dtype != own.dtype:
            continue
        rows, width = shape.numpy()
        if rows == into and width > out and _is_part(own, other):
            yield from _read_by(other)


def _is_part(own: ir.Value, other: ir.Value) -> bool:
    """Whether each row of a weight is part of that of another: the last and the first are asked."""
    assert own.const_value is not None
    if other.const_value is None:
        return False
    one, wide = own.const_value.numpy(), other.const_value.numpy()
    return all(one[row].any() and one[row].tobytes() in wide[row].tobytes() for row in (0, -1))
