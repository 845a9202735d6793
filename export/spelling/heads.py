"""Heads of an attention: taken apart, shared by several queries, put side by side again."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from lora_fx.export.spelling.rewrite import number, producer
from lora_fx.export.spelling.sizes import Sizes, shape_of

HEADS_FIRST = (0, 2, 1, 3)


class Rows(NamedTuple):
    """What holds all heads side by side, and how many these are."""

    value: ir.Value
    heads: int


def before_heads(value: ir.Value | None) -> Rows | None:
    """What is taken apart into heads, and turned so that these stand first."""
    turned = producer(value, "Transpose")
    if turned is None or turned.attributes["perm"].as_ints() != HEADS_FIRST:
        return None
    apart = producer(turned.inputs[0], "Reshape")
    shape = shape_of(turned.inputs[0])
    whole = shape_of(apart.inputs[0]) if apart is not None else None
    if apart is None or apart.inputs[0] is None or shape is None or not is_joined(whole, shape):
        return None
    return Rows(apart.inputs[0], int(shape[2]))


def is_joined(whole: Sizes | None, apart: Sizes) -> bool:
    """Whether (batch, length, heads * size) stands against (batch, length, heads, size)."""
    *leading, heads, size = apart
    if not isinstance(heads, int) or not isinstance(size, int):
        return False
    return len(apart) == 4 and whole == (*leading, heads * size)


def before_sharing(value: ir.Value) -> ir.Value:
    """What a value repeats, each head for so many heads of queries; else the value itself.

    ``Reshape(Expand(Unsqueeze(x, 2)))`` of (batch, heads, length, size).
    """
    joined = producer(value, "Reshape")
    spread = producer(joined.inputs[0], "Expand") if joined is not None else None
    apart = producer(spread.inputs[0], "Unsqueeze") if spread is not None else None
    if spread is None or apart is None:
        return value
    source = apart.inputs[0]
    shape, wide, whole = shape_of(source), shape_of(spread.outputs[0]), shape_of(value)
    if source is None or shape is None or wide is None or whole is None or len(wide) != 5:
        return value
    batch, heads, times, *rest = wide
    if not isinstance(heads, int) or not isinstance(times, int) or number(apart.inputs[1]) != 2:
        return value
    is_shared = shape == (batch, heads, *rest) and whole == (batch, heads * times, *rest)
    return source if is_shared else value


def joined_heads(node: ir.Node) -> ir.Node | None:
    """The node that puts the heads of a result side by side again."""
    shape = shape_of(node.outputs[0])
    while (reader := _only_reader(node)) is not None and reader.op_type == "Reshape":
        if shape_of(reader.outputs[0]) != shape:
            return None
        node = reader
    if reader is None or reader.op_type != "Transpose":
        return None
    joined, apart = _only_reader(reader), shape_of(reader.outputs[0])
    if reader.attributes["perm"].as_ints() != HEADS_FIRST or joined is None or apart is None:
        return None
    is_reshape = joined.op_type == "Reshape" and joined.inputs[0] is reader.outputs[0]
    return joined if is_reshape and is_joined(shape_of(joined.outputs[0]), apart) else None


def _only_reader(node: ir.Node) -> ir.Node | None:
    uses = tuple(node.outputs[0].uses())
    return uses[0].node if len(uses) == 1 and not node.outputs[0].is_graph_output() else None
