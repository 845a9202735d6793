"""Removes from an ONNX graph what inputs of no effect compute, as B = 0 does: the base is left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from lora_fx.export.rewriting.weight_reads import input_at

ZERO, ONE = "zero", "one"
_SUMS = {"Add", "Sum", "Sub"}
_BIASED = {"Conv", "ConvTranspose", "Gemm"}
_PRODUCTS = {"Mul", "MatMul", "Einsum", *_BIASED}
# What gives zeros of zeros, and ones of ones, of its first input.
_MOVES = {
    "Cast", "CastLike", "Expand", "Flatten", "Gather", "GatherElements", "Identity", "Reshape",
    "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip


@dataclass(frozen=True)
class Neutral:
    """A value that is zero, or one, everywhere.

    Attributes:
        what: which of the two.
        slots: paths of the slots that it is made of.
    """

    what: str
    slots: frozenset[str]


@dataclass(frozen=True)
class Join:
    """A node that gives one of its inputs, since nothing is added to it or it is scaled by one.

    Attributes:
        node: the node.
        kept: what it gives.
        slots: whose branch it is.
        is_sum: whether a branch was added.
    """

    node: ir.Node
    kept: ir.Value
    slots: frozenset[str]
    is_sum: bool


@dataclass
class Reading:
    """What becomes of neutral values in a graph.

    Attributes:
        known: every value that is neutral.
        joins: where they end.
        stuck: slots whose neutral values end in something else: path -> what that is.
    """

    known: dict[ir.Value, Neutral]
    joins: list[Join] = field(default_factory=list)
    stuck: dict[str, str] = field(default_factory=dict)


def read_neutral(model: ir.Model, neutral: Mapping[ir.Value, Neutral]) -> Reading:
    """Follows values that are neutral through a graph: ``y + (x @ A) @ 0`` is y."""
    reading = Reading(dict(neutral))
    for node in model.graph.all_nodes():
        found = {v: n for v in node.inputs if v is not None and (n := reading.known.get(v))}
        if found:
            _follow(node, found, reading)
    for output in (value for graph in model.graphs() for value in graph.outputs):
        if output in reading.known:
            reading.stuck |= dict.fromkeys(reading.known[output].slots, "an output")
    return reading


def take_out(joins: list[Join]) -> None:
    """Makes each node give what it is known to give: ``Add(y, 0)  ->  Identity(y)``."""
    for join in joins:
        join.node.replace_input_with(0, join.kept)
        join.node.resize_inputs(1)
        join.node.attributes.clear()  # of a Gemm
        join.node.op_type = "Identity"


def _follow(node: ir.Node, found: Mapping[ir.Value, Neutral], reading: Reading) -> None:
    slots = frozenset().union(*(neutral.slots for neutral in found.values()))
    others = [value for value in node.inputs if value is not None and value not in found]
    what = _gives(node, found, others)
    if what is not None:
        reading.known |= dict.fromkeys(node.outputs, Neutral(what, slots))
    elif (kept := _kept(node, found, others)) is not None:
        reading.joins.append(Join(node, kept, slots, node.op_type != "Mul"))
    else:
        reading.stuck |= dict.fromkeys(slots, node.op_type)


def _gives(node: ir.Node, found: Mapping[ir.Value, Neutral], others: list[ir.Value]) -> str | None:
    """What all that a node gives is, zero or one, if it is."""
    kind, zeros = node.op_type, [v for v, neutral in found.items() if neutral.what == ZERO]
    if kind in _PRODUCTS and zeros:
        bias = input_at(node, 2) if kind in _BIASED else None
        return ZERO if bias is None or bias in zeros else None
    if kind in (*_SUMS, "Concat") and not others and len(zeros) == len(found):
        return ZERO
    first = found.get(node.inputs[0]) if kind in _MOVES and node.inputs[0] is not None else None
    return first.what if first is not None else None


def _kept(
    node: ir.Node, found: Mapping[ir.Value, Neutral], others: list[ir.Value]
) -> ir.Value | None:
    """Which of its inputs a node gives, if it gives one as it is."""
    if node.op_type != "Gemm":
        return others[0] if len(others) == 1 and _passes(node, found) else None
    bias = input_at(node, 2)
    if bias is None or bias in found or node.attributes.get_float("beta", 1.0) != 1.0:
        return None
    is_zero = any(neutral.what == ZERO for neutral in found.values())
    is_whole = bias.shape is not None and bias.shape == node.outputs[0].shape
    return bias if is_zero and is_whole else None


def _passes(node: ir.Node, found: Mapping[ir.Value, Neutral]) -> bool:
    """Whether a node gives its only input that is not neutral."""
    wanted = {neutral.what for neutral in found.values()}
    if node.op_type in _SUMS:
        return wanted == {ZERO} and not (node.op_type == "Sub" and node.inputs[0] in found)
    return node.op_type == "Mul" and wanted == {ONE}
