"""Slots put beside the layers of a graph, as inputs with a default of no effect."""

from __future__ import annotations

import re
from collections.abc import Sequence

import onnx_ir as ir
import torch

from lora_fx.export.onnx_model.tensors import digest_of, to_torch
from lora_fx.export.rewriting.file_layers import FileLayer
from lora_fx.export.slots.manifest import DTYPES
from lora_fx.export.slots.slot import Slot


def slot_of(path: str, layer: FileLayer) -> Slot:
    """The slot of a layer of a file, with a digest of its weight as a model would store it."""
    out, into, *kernel = layer.shape
    return Slot(
        path, layer.kind, into, out, layer.dtype, tuple(kernel), digest=_digest(layer),
        groups=layer.groups,
    )  # fmt: skip


def _digest(layer: FileLayer) -> str:
    tensor = layer.weight.const_value
    assert tensor is not None
    if layer.quantised:  # torch has no names for all such numbers
        return digest_of(torch.frombuffer(bytearray(tensor.tobytes()), dtype=torch.uint8))
    stored = to_torch(tensor)
    return digest_of(stored.T if layer.turned else stored)


def insert_slot(model: ir.Model, slot: Slot, calls: Sequence[FileLayer]) -> None:
    """Puts a slot beside every call of a layer.

    Before -> after: ``MatMul(x, W)  ->  Add(MatMul(x, W), MatMul(MatMul(x, A), B))``, and likewise
    for a lookup and a convolution, whose A has its geometry. The nodes are called after the path.
    """
    rank = ir.SymbolicDim(f"rank:{slot.path}")
    factors = {}
    for part, given in slot.inputs.items():
        shape = ir.Shape([rank if size is None else size for size in given.shape])
        kind = ir.TensorType(DTYPES[slot.dtype])
        factors[part] = ir.Value(name=given.name, shape=shape, type=kind)
        model.graph.inputs.append(factors[part])
    for place, call in enumerate(calls):
        _beside(call, factors["down"], factors["up"], slot.path, f"_{place}" if place else "")


def _beside(call: FileLayer, down: ir.Value, up: ir.Value, path: str, behind: str) -> None:
    node, y = call.node, call.node.outputs[0]
    shrink, expand = _products(call, down, up)
    total = ir.node("Add", [y, expand.outputs[0]])
    for name, made in (("lora_A", shrink), ("lora_B", expand), ("lora", total)):
        made.name = f"{path}/{name}/{made.op_type}{behind}"
        made.outputs[0].name = f"{made.name}_output"
        made.outputs[0].type = y.type
    assert node.graph is not None  # a branch or a loop has one of its own
    node.graph.insert_after(node, [shrink, expand, total])
    read_instead(y, total)


def _products(call: FileLayer, down: ir.Value, up: ir.Value) -> tuple[ir.Node, ir.Node]:
    """The nodes of the branch."""
    node = call.node
    if call.kind == "embedding":
        shrink = ir.node("Gather", [down, node.inputs[1]], {"axis": 0})
    elif call.kind == "linear":
        shrink = ir.node("MatMul", [node.inputs[0], down])
    else:
        shrink = ir.node("Conv", [node.inputs[0], down])
        for name, value in node.attributes.items():
            if name != "group":
                shrink.attributes[name] = value
    is_matrix = call.kind in ("linear", "embedding")
    return shrink, ir.node("MatMul" if is_matrix else "Conv", [shrink.outputs[0], up])


def add_behind(node: ir.Node, bias: ir.Value) -> None:
    """Adds a bias to what a node gives, for all who read that."""
    y = node.outputs[0]
    total = ir.node("Add", [y, bias], name=as_called(node, "Add"))
    total.outputs[0].name, total.outputs[0].type = f"{y.name}_biased", y.type
    assert node.graph is not None
    node.graph.insert_after(node, [total])
    read_instead(y, total)


def as_called(node: ir.Node, kind: str) -> str:
    """The name of a node as one of another operator has it, with its number: ``fc/Add_1``."""
    return re.sub(rf"({node.op_type})?(_\d+)?$", rf"{kind}\2", str(node.name), count=1)


def read_instead(y: ir.Value, total: ir.Node) -> None:
    """Lets the readers of a layer read the sum; an output of the graph keeps its name."""
    made, is_output, name = total.outputs[0], y.is_graph_output(), y.name
    made.shape = y.shape
    others = [use for use in y.uses() if use.node is not total]
    if is_output:
        y.replace_all_uses_with(made, replace_graph_outputs=True)
        y.name, made.name = f"{name}_base", name
    for user, place in others:
        user.replace_input_with(place, made)
    total.replace_input_with(0, y)
