"""Attention in one operator, where a graph spells it out."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from lora_fx.export.spelling.rewrite import Spelling, number, producer, put
from lora_fx.export.spelling.shared_heads import before_sharing
from lora_fx.export.spelling.sizes import Sizes, shape_of

OPSET = 23  # the first that has the operator
_HEADS_FIRST = (0, 2, 1, 3)


class FuseAttention(Spelling):
    """Says products, mask and softmax as Attention, and what takes heads apart with them.

    Before -> after: ``MatMul(Softmax(Add(Mul(MatMul(q, Transpose(k)), scale), mask)), v)`` ->
    ``Attention(q, k, v, mask)``. The mask is added as it is, so it means what it meant. A softmax
    with a guard behind it stays apart.
    """

    since = OPSET
    what = f"attention by one operator, Attention of opset {OPSET}"

    def respell(self, node: ir.Node) -> bool:
        """Of the last product."""
        found = _attention(node)
        if found is None:
            return False
        q, k, v, mask, scale = found
        rows = [_before_heads(value) for value in (q, k, v)]
        last = _joined_heads(node)
        attributes: dict[str, float | int] = {"scale": scale}
        if last is None or None in rows:
            given: list[ir.Value | None] = [q, *_shared(_unturned(node, k), v)]
            last = node
        else:
            given = [row.value for row in rows if row is not None]
            heads = [row.heads for row in rows if row is not None]
            attributes |= {"q_num_heads": heads[0], "kv_num_heads": heads[1]}
        new = ir.node("Attention", [*given, mask][: 3 + (mask is not None)], attributes)
        put(last, [new], new.outputs[0])
        return True


class _Parts(NamedTuple):
    """Queries, keys with their last axes exchanged, values, the mask, and the scale."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    mask: ir.Value | None
    scale: float


class _Rows(NamedTuple):
    """What holds all heads side by side, and how many these are."""

    value: ir.Value
    heads: int


def _attention(node: ir.Node) -> _Parts | None:
    softmax = producer(node.inputs[0], "Softmax") if producer(node.outputs[0], "MatMul") else None
    if softmax is None or softmax.attributes.get_int("axis", -1) not in (-1, 3) or _read_elsewhere(softmax):
        return None
    scores, mask = softmax.inputs[0], None
    add = producer(scores, "Add")
    if add is not None:
        scores, mask = add.inputs
        if _product(scores)[0] is None:
            scores, mask = mask, scores
    product, scale = _product(scores)
    if product is None:
        return None
    (q, by_q), (k, by_k) = (_scaled(value) for value in product.inputs)
    v = node.inputs[1]
    parts = _Parts(q, k, v, mask, scale * by_q * by_k)
    return parts if all(part is not None for part in (q, k, v)) and _fits(parts) else None


def _read_elsewhere(node: ir.Node) -> bool:
    """Whether what a node gives is read elsewhere too, as attentions that are an output."""
    result = node.outputs[0]
    return len(result.uses()) != 1 or result.is_graph_output()


def _product(value: ir.Value | None) -> tuple[ir.Node | None, float]:
    """The product of queries and keys, and what it is multiplied by."""
    inner, scale = _scaled(value)
    return producer(inner, "MatMul"), scale


def _scaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """What a value is a multiple of."""
    node = producer(value, ("Mul", "Div"))
    factor = number(node.inputs[1]) if node is not None else None
    if node is None or not factor:
        return value, 1.0
    return node.inputs[0], factor if node.op_type == "Mul" else 1 / factor


def _fits(parts: _Parts) -> bool:
    """Whether sizes are those that the operator takes: four axes, and a mask for each query."""
    q, k, v = (shape_of(value) for value in parts[:3])
    if parts.q.dtype is not ir.DataType.FLOAT or q is None or k is None or v is None:
        return False
    are_four = len(q) == len(k) == len(v) == 4
    if not are_four or q[:2] != k[:2] or k[:2] != v[:2] or k[3] != v[2] or q[3] != k[2]:
        return False
    mask = shape_of(parts.mask) if parts.mask is not None else (1, 1, q[2], k[3])
    if mask is None or len(mask) != 4 or mask[2:] != (q[2], k[3]):
        return False
    return all(size in (1, whole) for size, whole in zip(mask[:2], q[:2], strict=True))


def _before_heads(value: ir.Value) -> _Rows | None:
    """What is taken apart into heads, of queries, of values, or of keys that are turned."""
    turned = producer(value, "Transpose")
    if turned is None or turned.attributes["perm"].as_ints() not in (_HEADS_FIRST, (0, 2, 3, 1)):
        return None
    apart = producer(turned.inputs[0], "Reshape")
    shape = shape_of(turned.inputs[0])
    whole = shape_of(apart.inputs[0]) if apart is not None else None
    if apart is None or apart.inputs[0] is None or shape is None or not _is_joined(whole, shape):
        return None
    return _Rows(apart.inputs[0], int(shape[2]))


def _is_joined(whole: Sizes | None, apart: Sizes) -> bool:
    """Whether (batch, length, heads * size) stands against (batch, length, heads, size)."""
    *leading, heads, size = apart
    if not isinstance(heads, int) or not isinstance(size, int):
        return False
    return len(apart) == 4 and whole == (*leading, heads * size)


def _joined_heads(node: ir.Node) -> ir.Node | None:
    """The node that puts the heads of a result side by side again."""
    shape = shape_of(node.outputs[0])
    while (reader := _only_reader(node)) is not None and reader.op_type == "Reshape":
        if shape_of(reader.outputs[0]) != shape:
            return None
        node = reader
    if reader is None or reader.op_type != "Transpose":
        return None
    joined, apart = _only_reader(reader), shape_of(reader.outputs[0])
    if reader.attributes["perm"].as_ints() != _HEADS_FIRST or joined is None or apart is None:
        return None
    is_reshape = joined.op_type == "Reshape" and joined.inputs[0] is reader.outputs[0]
    return joined if is_reshape and _is_joined(shape_of(joined.outputs[0]), apart) else None


def _only_reader(node: ir.Node) -> ir.Node | None:
    uses = node.outputs[0].uses()
    return uses[0].node if len(uses) == 1 and not node.outputs[0].is_graph_output() else None


def _shared(k: ir.Value, v: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Keys and values before they are repeated for the queries that share them."""
    fewer = before_sharing(k), before_sharing(v)
    shapes = [shape_of(value) for value in fewer]
    return fewer if shapes[0] is not None and shapes[0] == shapes[1] else (k, v)


def _unturned(node: ir.Node, k: ir.Value) -> ir.Value:
    """Keys as they were before their last axes were exchanged."""
    turned = producer(k, "Transpose")
    axes = turned.attributes["perm"].as_ints() if turned is not None else (0, 1, 2, 3)
    order = (*axes[:-2], axes[-1], axes[-2])
    source = k if turned is None else turned.inputs[0]
    assert source is not None
    if order == (0, 1, 2, 3):
        return source
    new = ir.node("Transpose", [source], {"perm": order})
    new.metadata_props.update(node.metadata_props)
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_before(node, new)
    shape = shape_of(k)
    assert shape is not None
    new.outputs[0].type, new.outputs[0].shape = k.type, ir.Shape([*shape[:2], shape[3], shape[2]])
    return new.outputs[0]
