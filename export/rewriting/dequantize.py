"""Quantised weights as the numbers that they stand for: what a branch beside them is held to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from lora_fx.export.rewriting.file_layers import FileLayer

Array = np.ndarray[Any, Any]
_BITS = (2, 4, 8)


def is_known(layer: FileLayer) -> bool:
    """Whether the numbers of a layer's weight can be told."""
    node = layer.node
    if node.op_type != "MatMulNBits":
        return not layer.quantised or _before(node) is not None
    rest = [value for value in node.inputs[4:] if value is not None]
    return not rest and node.attributes.get_int("bits", 4) in _BITS


def dequantise(model: ir.Model, nodes: Sequence[ir.Node]) -> None:
    """Gives layers their weights as plain numbers, in place.

    Before -> after: ``MatMulNBits(x, q, scale)  ->  MatMul(x, W)``, and
    ``MatMul(x, DequantizeLinear(q, scale))  ->  MatMul(x, W)``.

    Args:
        model: the model.
        nodes: of the layers, all of which are known.
    """
    for node in nodes:
        if node.op_type == "MatMulNBits":
            weight = _constant(model, f"{node.name}_float", _of_bits(node))
            node.replace_input_with(1, weight)
            node.resize_inputs(2)
            node.attributes.clear()
            node.domain, node.op_type = "", "MatMul"
        elif (before := _before(node)) is not None:
            result = before.outputs[0]
            result.replace_all_uses_with(_constant(model, f"{node.name}_float", _of_linear(before)))


def _before(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear that gives a layer its weight."""
    for value in node.inputs[:2]:
        found = None if value is None else value.producer()
        if found is not None and found.op_type == "Transpose" and found.inputs[0] is not None:
            found = found.inputs[0].producer()
        if found is not None and found.op_type == "DequantizeLinear":
            whole = found.inputs[0]
            return found if whole is not None and whole.is_initializer() else None
    return None


def _constant(model: ir.Model, name: str, values: Array) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(values, name=name))
    value.shape, value.type = (
        ir.Shape(values.shape),
        ir.TensorType(ir.DataType.from_numpy(values.dtype)),
    )
    model.graph.register_initializer(value)
    return value


def _of_bits(node: ir.Node) -> Array:
    """(in, out): blocks of one row of an output after the other, the low bits first."""
    into, out, bits, block = (node.attributes[n].as_int() for n in ("K", "N", "bits", "block_size"))
    count = -(-into // block)
    values = _unpacked(_array(node, 1).reshape(out, count, -1), bits)[..., :block]
    scale = _array(node, 2).reshape(out, count, 1)
    zero: Array | int = 1 << bits - 1
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        zero = _array(node, 3)
        if zero.dtype == np.uint8:
            zero = _unpacked(zero.reshape(out, -1), bits)[:, :count]
        zero = zero.reshape(out, count, 1).astype(np.float32)
    made = (values.astype(np.float32) - zero) * scale.astype(np.float32)
    return np.ascontiguousarray(made.reshape(out, -1)[:, :into].T.astype(scale.dtype))


def _unpacked(values: Array, bits: int) -> Array:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    apart = values[..., None] >> shifts & (1 << bits) - 1
    return apart.reshape(*values.shape[:-1], -1)


def _of_linear(node: ir.Node) -> Array:
    """What a DequantizeLinear gives: by one scale, one along an axis, or one for each block."""
    values, scale = _array(node, 0).astype(np.float32), _array(node, 1)
    zero = _array(node, 2) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    axis = node.attributes.get_int("axis", 1) or 0
    block = node.attributes.get_int("block_size", 0) or 0

    def spread(array: Array) -> Array:
        wide = array.astype(np.float32)
        if wide.ndim == values.ndim and block:
            return np.repeat(wide, block, axis).take(range(values.shape[axis]), axis)
        if wide.size == 1:
            return wide.reshape(())
        return wide.reshape([-1 if n == axis % values.ndim else 1 for n in range(values.ndim)])

    shifted = values if zero is None else values - spread(zero)
    return (shifted * spread(scale)).astype(scale.dtype)


def _array(node: ir.Node, place: int) -> Array:
    value = node.inputs[place]
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    assert tensor is not None
    return tensor.numpy()
