"""Removes calls that change nothing, and joins Unsqueezes that add axes one by one."""

from __future__ import annotations

import onnx_ir as ir

from lora_fx.export.spelling.rewrite import Spelling, number, producer, put, shaped
from lora_fx.export.spelling.sizes import shape_of, sizes_in

_MOVES = ("Slice", "Expand", "Transpose", "And", "Cast")


class DropIdleCalls(Spelling):
    """Leaves out what gives its input, as a mask is full of.

    Before -> after: ``Expand(x, sizes of x)``, ``x[0:]``, ``And(x, True)``, ``Cast(x)`` to its own
    type -> ``x``, and ``Unsqueeze(Unsqueeze(x))`` -> ``Unsqueeze(x)``. A decoder pays for each of
    them at each token.
    """

    what = "calls that change nothing left out"

    def respell(self, node: ir.Node) -> bool:
        """Of a call."""
        result = node.outputs[0]
        if producer(result, "Unsqueeze") is not None:
            return _at_once(node)
        if producer(result, _MOVES) is None or result.is_graph_output():
            return False
        same = _same(node)
        if same is None or len({same.dtype, result.dtype} - {None}) > 1:
            return False
        same.shape, same.type = same.shape or result.shape, same.type or result.type
        result.replace_all_uses_with(same)
        assert isinstance(node.graph, ir.Graph)
        node.graph.remove(node, safe=True)
        return True


def _same(node: ir.Node) -> ir.Value | None:
    """The input that a call gives as it is."""
    x, shape = node.inputs[0], shape_of(node.outputs[0])
    if node.op_type == "Transpose":
        order = node.attributes["perm"].as_ints()
        return x if order == tuple(range(len(order))) else None
    if node.op_type == "Cast":
        source = producer(x, "Softmax")  # of what it gives torch.onnx notes no type
        typed = x if source is None else source.inputs[0]
        is_same = typed is not None and typed.dtype == node.attributes["to"].as_int()
        return x if is_same else None
    if shape is None:
        return None
    if node.op_type == "And":
        sides = ((x, node.inputs[1]), (node.inputs[1], x))
        return next((v for v, other in sides if number(other) == 1 and shape_of(v) == shape), None)
    if x is None or shape_of(x) != shape:
        return None
    steps = node.inputs[4] if len(node.inputs) > 4 else None
    return x if steps is None or set(sizes_in(steps) or (0,)) == {1} else None


def _at_once(node: ir.Node) -> bool:
    """Adds axes to what another call has added some to."""
    before, shape = producer(node.inputs[0], "Unsqueeze"), node.outputs[0].shape
    if before is None or shape is None:
        return False
    first, last = sizes_in(before.inputs[1]), sizes_in(node.inputs[1])
    if first is None or last is None:
        return False
    rank = shape.rank()
    added = [int(axis) % rank for axis in last]
    kept = [axis for axis in range(rank) if axis not in added]
    axes = sorted([*added, *(kept[int(axis)] for axis in first)])
    nodes = shaped("Unsqueeze", before.inputs[0], axes)
    put(node, nodes, nodes[-1].outputs[0])
    return True
