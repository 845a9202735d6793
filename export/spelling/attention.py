"""Fuses MatMul, mask, Softmax and MatMul into Attention of opset 23."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from lora_fx.export.spelling.bounds import bounds_of
from lora_fx.export.spelling.heads import before_heads, before_sharing, joined_heads
from lora_fx.export.spelling.rewrite import (
    Spelling,
    constant,
    number,
    producer,
    put,
    take_over,
)
from lora_fx.export.spelling.sizes import shape_of

OPSET = 23  # the first that has the operator
_LEAST = float(ir.DataType.FLOAT.min)
# Brings the least number to the next one, and no other further than its own rounding.
_A_BIT_LESS = np.nextafter(np.float32(1), np.float32(0))


class FuseAttention(Spelling):
    """Says products, mask and softmax as Attention, and what takes heads apart with them.

    Before -> after: ``MatMul(Softmax(Add(Mul(MatMul(q, Transpose(k)), scale), mask)), v)`` ->
    ``Attention(q, k, v, mask)``. What caps the scores before the mask is added, ``cap *
    tanh(scores / cap)``, is an attribute. A softmax with a guard behind it stays apart. A row of
    the least number is a mean of all values, as any equal numbers are; onnxruntime's operator takes
    it for one of -inf, and gives 0, so a mask that may hold the least number is multiplied by a bit
    less than one.
    """

    since = OPSET
    what = f"attention by one operator, Attention of opset {OPSET}"

    def __init__(self) -> None:
        super().__init__()
        self._masks: dict[ir.Value, ir.Value] = {}

    def respell(self, node: ir.Node) -> bool:
        """Of the last product."""
        found = _attention(node)
        if found is None:
            return False
        attributes: dict[str, float | int] = {"scale": found.scale}
        if found.cap:
            attributes["softcap"] = found.cap
        k, v = _shared(_unturned(node, found.k), found.v)
        caches = _cached(k, v) if _only_way(k, node) and _only_way(v, node) else ()
        new_k, new_v = (cache.inputs[1] for cache in caches) if caches else (k, v)
        rows = [before_heads(value) for value in (found.q, new_k, new_v)]
        last = joined_heads(node)
        given: list[ir.Value | None] = [found.q, new_k, new_v]
        if last is not None and None not in rows:
            given = [row.value for row in rows if row is not None]
            heads = [row.heads for row in rows if row is not None]
            attributes |= {"q_num_heads": heads[0], "kv_num_heads": heads[1]}
        else:
            last = node
        past = [cache.inputs[0] for cache in caches]
        mask = self._without_least(found.mask, node)
        given += [mask, *past] if mask is not None or past else []
        new = ir.node("Attention", given, attributes, num_outputs=1 + len(past))
        put(last, [new], new.outputs[0])
        for cache, present in zip(caches, new.outputs[1:], strict=True):
            take_over(cache.outputs[0], present)
        return True

    def _without_least(self, mask: ir.Value | None, node: ir.Node) -> ir.Value | None:
        """A mask that holds the least number nowhere, made once for all that read it."""
        if mask is None or not _may_be_least(mask):
            return mask
        if mask not in self._masks:
            factor = constant(_A_BIT_LESS)
            new = ir.node("Mul", [mask, factor.outputs[0]])
            raised = new.outputs[0]
            raised.type, raised.shape, raised.name = mask.type, mask.shape, f"{mask.name}_raised"
            before, graph = mask.producer(), node.graph
            assert isinstance(graph, ir.Graph)
            if before is None:
                graph.insert_before(graph[0], [factor, new])
            else:
                graph.insert_after(before, [factor, new])
            self._masks[mask] = raised
        return self._masks[mask]


class _Parts(NamedTuple):
    """Queries, keys with their last axes exchanged, values, the mask, the scale, and the cap."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    mask: ir.Value | None
    scale: float
    cap: float


def _may_be_least(mask: ir.Value | None) -> bool:
    """Whether a place of a mask can hold the least number; -inf is none."""
    chosen = producer(mask, "Where")
    if chosen is not None:
        return any(_may_be_least(value) for value in chosen.inputs[1:])
    return number(mask) != -np.inf and bounds_of(mask).low <= _LEAST


def _attention(node: ir.Node) -> _Parts | None:
    softmax = producer(node.inputs[0], "Softmax") if producer(node.outputs[0], "MatMul") else None
    if (
        softmax is None
        or softmax.attributes.get_int("axis", -1) not in (-1, 3)
        or _read_elsewhere(softmax)
    ):
        return None
    scores, mask = softmax.inputs[0], None
    add = producer(scores, "Add")
    if add is not None:
        scores, mask = add.inputs
        if _product(scores)[0] is None:
            scores, mask = mask, scores
    product, scale, cap = _product(scores)
    if product is None:
        return None
    (q, by_q), (k, by_k) = (_scaled(value) for value in product.inputs)
    v = node.inputs[1]
    if q is None or k is None or v is None:
        return None
    parts = _Parts(q, k, v, mask, scale * by_q * by_k, cap)
    return parts if _fits(parts) else None


def _read_elsewhere(node: ir.Node) -> bool:
    """Whether what a node gives is read elsewhere too, as attentions that are an output."""
    result = node.outputs[0]
    return len(result.uses()) != 1 or result.is_graph_output()


def _product(value: ir.Value | None) -> tuple[ir.Node | None, float, float]:
    """The product of queries and keys, what it is multiplied by, and what caps it: 0 if nothing.

    ``cap * tanh(scale / cap * product)``, as Gemma 2 has it.
    """
    inner, scale = _scaled(value)
    tanh = producer(inner, "Tanh")
    if tanh is None:
        return producer(inner, "MatMul"), scale, 0.0
    inner, by = _scaled(tanh.inputs[0])
    inner, more = _scaled(inner)
    return producer(inner, "MatMul"), scale * by * more, abs(scale)


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
    if not are_four or q[0] != k[0] or k[:2] != v[:2] or k[3] != v[2] or q[3] != k[2]:
        return False
    if k[1] not in (q[1], 1):  # one head of keys is every query's
        return False
    mask = shape_of(parts.mask) if parts.mask is not None else (1, 1, q[2], k[3])
    if mask is None or len(mask) != 4 or mask[2:] != (q[2], k[3]):
        return False
    return all(size in (1, whole) for size, whole in zip(mask[:2], q[:2], strict=True))


def _shared(k: ir.Value, v: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Keys and values before they are repeated for the queries that share them."""
    fewer = before_sharing(k), before_sharing(v)
    shapes = [shape_of(value) for value in fewer]
    return fewer if shapes[0] is not None and shapes[0] == shapes[1] else (k, v)


def _cached(k: ir.Value, v: ir.Value) -> tuple[ir.Node, ...]:
    """What puts new keys and values behind those of a cache."""
    found = []
    for value in (k, v):
        joined = producer(value, "Concat")
        if joined is None or len(joined.inputs) != 2:
            return ()
        if joined.attributes["axis"].as_int() not in (-2, 2):
            return ()
        found.append(joined)
    return tuple(found)


def _only_way(value: ir.Value, last: ir.Node) -> bool:
    """Whether nothing but one attention reads a value, or what becomes of it on the way there."""
    while len(uses := tuple(value.uses())) == 1:
        if uses[0].node is last:
            return True
        value = uses[0].node.outputs[0]
        if value.is_graph_output():
            return False
    return False


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
    new.outputs[0].type = k.type or ir.TensorType(ir.DataType.FLOAT)  # that of the queries
    new.outputs[0].shape = ir.Shape([*shape[:2], shape[3], shape[2]])
    return new.outputs[0]
