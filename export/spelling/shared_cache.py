"""Caches that are written in place: one buffer holds what came before, and what there is after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from lora_fx.errors import ExportError
from lora_fx.export.onnx_model.tensor_protos import MICROSOFT
from lora_fx.export.runtime.in_place import AXES, OPERATOR
from lora_fx.export.spelling.causal import hides_what_follows
from lora_fx.export.spelling.heads import HEADS_FIRST, before_heads, joined_heads
from lora_fx.export.spelling.rewrite import constant, producer, put, shaped, take_over
from lora_fx.export.spelling.sizes import Sizes, shape_of

_WHAT = f"caches that can be written in place, {OPERATOR} of onnxruntime"
_MULTIPLE = 8  # of this is the size of the heads that the operator takes


def share_caches(model: ir.Model) -> dict[str, int]:
    """Lets every attention write its keys and values into the buffer that its cache is.

    Before -> after: ``Attention(q, k, v, mask, past_k, past_v)`` -> ``GroupQueryAttention(q, k, v,
    past_k, past_v, lengths, length, mask)``. How much came before is no longer the size of a cache
    but that of all less what is new, so a cache may have room for more: it is given as an input
    and as the output. One without room is copied, as before.

    The operator hides from a query what stands behind it, as the mask has to. Where a mask hides
    all, as it does from padding, eager gives the mean of all values, and the operator that of those
    which do not stand behind.

    Args:
        model: attention is one operator in it, and inputs have the file's names; changed in place.

    Returns:
        What was done, and how often. The model's metadata names the axes of the batch and of what
        is new: behind a cache the operator takes one row, or one new token of each.

    Raises:
        ExportError: a cache cannot be shared; names it, and says why.
    """
    graph = model.graph
    cached = [node for node in graph if _has_cache(node)]
    pasts = {past for node in cached for past in node.inputs[4:]}
    others = [given for given in graph.inputs if given not in pasts]
    reasons = [*dict.fromkeys(_reasons(cached, others))]
    if reasons:
        more = f", and {len(reasons) - 1} more" if len(reasons) > 1 else ""
        raise ExportError(
            f"shared_cache: {reasons[0]}{more}. Leave it out, and a cache is copied at each step"
        )
    axes = _Axes.of(cached[0])
    for past in pasts:
        for reader, size in _measures(past, others):
            asked = (axes.whole, axes.new) if size == axes.past else (size,)
            nodes = [_measured(others, each) for each in asked]
            if len(nodes) > 1:
                nodes.append(ir.node("Sub", [each.outputs[0] for each in nodes]))
            put(reader, nodes, nodes[-1].outputs[0])
    length, rows = _measured(others, axes.whole), _measured(others, axes.batch)
    total = ir.node("Cast", [length.outputs[0]], {"to": ir.DataType.INT32})
    one = constant(np.array([1], np.int32))
    last = ir.node("Sub", [total.outputs[0], one.outputs[0]])
    lasts = ir.node("Expand", [last.outputs[0], rows.outputs[0]])
    graph.insert_before(cached[0], [length, total, one, last, rows, lasts])
    for node in cached:
        _say(node, lasts.outputs[0], total.outputs[0])
    model.opset_imports[MICROSOFT] = 1
    common.RemoveUnusedNodesPass()(model)
    model.metadata_props[AXES] = f"{axes.batch}, {axes.new}"
    return {_WHAT: len(cached)}


class _Axes(NamedTuple):
    """The names of the axes of an attention that appends to a cache."""

    batch: int | str
    past: int | str
    new: int | str
    whole: int | str

    @classmethod
    def of(cls, node: ir.Node) -> _Axes:
        _, _, _, mask, past, _ = node.inputs
        (batch, _, before, _), (_, _, new, whole) = _sizes(past), _sizes(mask)
        return cls(batch, before, new, whole)

    @property
    def asked(self) -> tuple[int | str, ...]:
        """Those for which an input is asked."""
        return self.batch, self.new, self.whole


def _has_cache(node: ir.Node) -> bool:
    return producer(node.outputs[0], "Attention") is not None and len(node.inputs) == 6


def _reasons(cached: Sequence[ir.Node], others: Sequence[ir.Value]) -> Iterator[str]:
    """Why caches cannot be shared."""
    if not cached:
        yield "no attention in float32 appends to a cache that is an input"
    for node in cached:
        axes = _Axes.of(node)
        _, _, _, mask, key, value = node.inputs
        assert key is not None
        assert value is not None
        (_, heads, _, size), (*_, of_values) = _sizes(key), _sizes(value)
        if axes != _Axes.of(cached[0]) or not all(_is_given(others, axis) for axis in axes.asked):
            yield f"{key.name}: no input is as long as all, as an attention_mask is"
        for other in (given for given in others if axes.past in _sizes(given)):
            yield f"{other.name} is as long as a cache, and no attention appends to it"
        ends = zip((key, value), node.outputs[1:], strict=True)
        if any(_is_shared(node, past, present, others) for past, present in ends):
            yield f"{key.name} is not of one attention alone"
        if mask is None or not hides_what_follows(mask, key):
            yield f"{key.name}: nothing shows that its mask hides what stands behind a query"
        if not (isinstance(heads, int) and isinstance(size, int)) or size % _MULTIPLE:
            yield f"{key.name}: {heads} heads of {size}: {OPERATOR} takes multiples of {_MULTIPLE}"
        if size != of_values:
            yield f"{key.name}: its heads are of {size}, those of values of {of_values}"


def _sizes(value: ir.Value | None) -> Sizes:
    return shape_of(value) or ("", "", "", "")


def _is_shared(
    node: ir.Node, past: ir.Value, present: ir.Value, others: Sequence[ir.Value]
) -> bool:
    """Whether a cache is read by others than one attention, and what asks for its sizes."""
    asking = {reader for reader, _ in _measures(past, others)}
    readers = {use.node for use in past.uses()} - {node, *asking}
    are_ends = past.is_graph_input() and present.is_graph_output()
    return bool(readers or present.uses()) or not are_ends


def _measures(
    past: ir.Value | None, others: Sequence[ir.Value]
) -> Iterator[tuple[ir.Node, int | str]]:
    """What asks for a size of a cache that other inputs tell as well, and the name of its axis."""
    for node in {use.node for use in past.uses()} if past is not None else ():
        start, end = (node.attributes.get_int(name, -1) for name in ("start", "end"))
        size = _sizes(past)[start]
        if node.op_type == "Shape" and start == end - 1 and (start == 2 or _is_given(others, size)):
            yield node, size


def _is_given(others: Sequence[ir.Value], size: int | str) -> bool:
    """Whether an axis of an input has this name."""
    return isinstance(size, str) and any(size in _sizes(given) for given in others)


def _measured(others: Sequence[ir.Value], size: int | str) -> ir.Node:
    """What asks an input for a size by its name."""
    given = next(given for given in others if size in _sizes(given))
    axis = _sizes(given).index(size)
    return ir.node("Shape", [given], {"start": axis, "end": axis + 1})


def _say(node: ir.Node, lasts: ir.Value, total: ir.Value) -> None:
    """Says an attention by the operator that shares its cache, whose heads stand side by side."""
    *parts, mask, key, value = node.inputs
    own = node.attributes
    are_rows = "q_num_heads" in own
    heads = own["q_num_heads"].as_int() if are_rows else int(_sizes(parts[0])[1])
    last = node if are_rows else joined_heads(node)
    nodes: list[ir.Node] = []
    rows = [part if are_rows else _side_by_side(part, nodes) for part in parts]
    given = [*rows, key, value, lasts, total, None, None, None, mask]
    counts = {"num_heads": heads, "kv_num_heads": int(_sizes(key)[1])}
    numbers = {name: own[name].as_float() for name in ("scale", "softcap") if name in own}
    attributes: dict[str, int | float] = counts | numbers
    nodes.append(ir.node(OPERATOR, given, attributes, domain=MICROSOFT, num_outputs=3))
    for old, present in zip(node.outputs[1:], nodes[-1].outputs[1:], strict=True):
        take_over(old, present)
    if last is None:
        nodes += shaped("Reshape", nodes[-1].outputs[0], [0, 0, heads, -1])
        nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]], {"perm": HEADS_FIRST}))
    put(last or node, nodes, nodes[-1].outputs[0])


def _side_by_side(part: ir.Value | None, nodes: list[ir.Node]) -> ir.Value:
    """The heads of a part side by side, of which the nodes that are needed are added to others."""
    rows = before_heads(part)
    if rows is not None:
        return rows.value
    nodes.append(ir.node("Transpose", [part], {"perm": HEADS_FIRST}))
    nodes += shaped("Reshape", nodes[-1].outputs[0], [0, 0, -1])
    return nodes[-1].outputs[0]
