"""Where the weight is that a branch stands beside: walked back from where the branch was added."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

# What hands a weight on, as it is, in parts, or with its axes turned round.
_HANDS_ON = {"Identity", "Cast", "Split", "Slice", "Transpose"}
# What may lie between a layer and the sum with its branch.
_BETWEEN = {
    "Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip
_TURNED = {"in out": "out in", "out in": "in out"}


@dataclass(frozen=True)
class Read:
    """One reading of a weight by its layer.

    Attributes:
        node: the layer's node, or the weight's own reader where that is made at each call.
        place: which of its inputs the weight is.
        weight: the initializer at the end of it.
        axes: how the file stores that, as `lora_fx.layers.axes` says; None if it is unknown.
        bias: the initializer that is added next, and its reader, or None.
        in_parts: whether only a part of the weight is read.
    """

    node: ir.Node
    place: int
    weight: ir.Value
    axes: str | None
    bias: tuple[ir.Value, ir.Node, int] | None = None
    in_parts: bool = False


def input_at(node: ir.Node, place: int) -> ir.Value | None:
    """An input that a node may go without, at the end or in between."""
    return node.inputs[place] if len(node.inputs) > place else None


def reads_behind(value: ir.Value, total: ir.Value) -> list[Read]:
    """The layer that a branch was beside, as the readings of its weight; empty if it is not told.

    Args:
        value: what the branch was added to.
        total: what the sum was, which is the value now.
    """
    source, _, _ = source_of(value)
    if source is not None:  # the branch is added to the weight itself
        return [_read(node, place, source) for node, place in readers(total)]
    bias = None
    while (node := value.producer()) is not None:
        weights = [(p, v) for p, v in enumerate(node.inputs) if v and source_of(v)[0] is not None]
        if node.op_type == "Add" and len(weights) == 1:
            place, added = weights[0]
            if bias is None and added.is_initializer():
                bias = added, node, place
            value = node.inputs[1 - place]  # type: ignore[assignment]
        elif node.op_type in _BETWEEN and node.inputs[0] is not None:
            value = node.inputs[0]
        else:
            return _layer(node, bias)
    return []


def readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Who reads a weight in the end: what only hands it on is passed over."""
    for node, place in value.uses():
        if node.op_type in _HANDS_ON and place == 0:
            for output in node.outputs:
                yield from readers(output)
        else:
            yield node, place


def source_of(value: ir.Value) -> tuple[ir.Value | None, bool, bool]:
    """The initializer that a value hands on, whether it is turned round, and whether it is a part.

    None if the value is something else.
    """
    source, turned, in_parts = handed_on(value)
    return (source, turned, in_parts) if source.is_initializer() else (None, False, False)


def handed_on(value: ir.Value) -> tuple[ir.Value, bool, bool]:
    """What a value is in the end, whether it is turned round on the way, and whether a part."""
    turned = in_parts = False
    while (node := value.producer()) is not None and node.op_type in _HANDS_ON:
        if node.inputs[0] is None:
            break
        turned ^= turns(node)
        in_parts |= node.op_type in ("Split", "Slice")
        value = node.inputs[0]
    return value, turned, in_parts


def blocks_of(rows: ir.Value) -> ir.Value:
    """What a head reads in blocks where a lookup reads whole rows: the same numbers."""
    node = rows.producer()
    is_other_shape = node is not None and node.op_type == "Reshape" and node.inputs[0] is not None
    return node.inputs[0] if is_other_shape else rows  # type: ignore[union-attr, return-value]


def turns(node: ir.Node) -> bool:
    """Whether a node turns a weight round: a Transpose may leave its axes where they are."""
    order = node.attributes.get_ints("perm", None)
    return node.op_type == "Transpose" and (order is None or list(order) != sorted(order))


def type_of(value: ir.Value) -> ir.DataType | None:
    """The type of what hands a weight on, or makes numbers of whole ones."""
    node = value.producer()
    if node is not None and node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    is_scaled = node is not None and node.op_type == "DequantizeLinear"
    before = None if node is None else node.inputs[1 if is_scaled else 0]
    return value.dtype if before is None else type_of(before)


def looks_up_rows(gather: ir.Node) -> bool:
    """Whether a lookup in a matrix gives rows of it."""
    return gather.attributes.get_int("axis", 0) in (0, -2)


def read_another(read: Read, weight: ir.Value) -> None:
    """Lets one reader read another weight, handed on in the same way."""
    value = read.node.inputs[read.place]
    assert value is not None
    read.node.replace_input_with(read.place, _handed_on(value, read, weight))


def _handed_on(value: ir.Value, read: Read, weight: ir.Value) -> ir.Value:
    if value is read.weight:
        return weight
    node = value.producer()
    assert node is not None
    assert node.inputs[0] is not None
    source = _handed_on(node.inputs[0], read, weight)
    inputs = [source, *node.inputs[1:]]
    copy = ir.Node(
        node.domain, node.op_type, inputs, node.attributes.values(), num_outputs=len(node.outputs)
    )
    node.graph.insert_before(node, copy)  # type: ignore[union-attr]
    made = copy.outputs[list(node.outputs).index(value)]
    made.type = value.type if node.op_type == "Cast" else source.type
    made.shape = value.shape
    return made


def _layer(node: ir.Node, bias: tuple[ir.Value, ir.Node, int] | None) -> list[Read]:
    """The reading of a layer's node: what it multiplies with, or looks up."""
    place = 0 if node.op_type == "Gather" else 1
    if node.op_type not in ("MatMul", "Gemm", "Gather", "Conv", "ConvTranspose"):
        return []
    if node.op_type == "MatMul" and node.inputs[1] is not None:
        place = int(source_of(node.inputs[1])[0] is not None)
    value = node.inputs[place]
    source = None if value is None else source_of(value)[0]
    if source is None:
        return []
    third = input_at(node, 2) if node.op_type != "Gather" else None
    if third is not None and bias is None and third.is_initializer():
        bias = third, node, 2
    return [_read(node, place, source, bias)]


def _read(
    node: ir.Node,
    place: int,
    source: ir.Value,
    bias: tuple[ir.Value, ir.Node, int] | None = None,
) -> Read:
    value, axes = node.inputs[place], _axes(node, place)
    assert value is not None
    _, turned, in_parts = source_of(value)
    return Read(node, place, source, _TURNED.get(axes or "") if turned else axes, bias, in_parts)


def _axes(node: ir.Node, place: int) -> str | None:
    """How a node takes its weight."""
    if node.op_type == "MatMul":
        return "in out" if place == 1 else "out in"
    if node.op_type == "Gemm" and place == 1 and node.attributes.get_float("alpha", 1.0) == 1.0:
        return "out in" if node.attributes.get_int("transB", 0) else "in out"
    if node.op_type == "Gather" and looks_up_rows(node):
        return "in out"
    return {"Conv": "out in *k", "ConvTranspose": "in out *k"}.get(node.op_type)
