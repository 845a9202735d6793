"""Quantised weights as the numbers that they stand for: what a branch beside them is held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from lora_fx.export.onnx_model.tensors import add_constant
from lora_fx.export.rewriting.file_layers import FileLayer, layers_in
from lora_fx.export.rewriting.insert_slots import add_behind
from lora_fx.export.rewriting.weight_reads import blocks_of, handed_on, input_at

Array = np.ndarray[Any, Any]
_BITS = (2, 4, 8)
_ORDER, _BIAS = 4, 5  # inputs of MatMulNBits; with the first one, zero points are read or not
LOOKUP, DEFAULT_BLOCK = "GatherBlockQuantized", 128
# What four bits stand for, by MatMulBnb4's quant_type: bitsandbytes' fp4 and nf4, the quantiles of
# a normal distribution. Source: QLoRA (Dettmers et al., 2023), appendix E, and bitsandbytes.
_FP4 = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
TABLES = (
    np.array([*_FP4, *(-value for value in _FP4)], np.float32),
    np.array(
        [
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
            *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
            *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
            *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
        ],
        np.float32,
    ),
)


def is_known(layer: FileLayer) -> bool:
    """Whether the numbers of a layer's weight can be told."""
    node = layer.node
    if node.op_type not in _OF_NODE:
        return not layer.quantised or _before(node) is not None
    is_packed = layer.kind == "linear" or layer.weight.dtype == ir.DataType.UINT8
    is_ordered = input_at(node, _ORDER) is not None
    return is_packed and not is_ordered and node.attributes.get_int("bits", 4) in _BITS


def in_few_bits(model: ir.Model) -> list[FileLayer]:
    """The layers of a file whose weights `weight_and_step` tells."""
    packed = (layer for layer in layers_in(model) if layer.node.op_type in _OF_NODE)
    return [layer for layer in packed if is_known(layer)]


def weight_and_step(node: ir.Node) -> tuple[Array, Array]:
    """W (in, out), or of a lookup (width, rows), and how far apart its numbers are at most there.

    Args:
        node: of a layer of `in_few_bits`.
    """
    return _OF_NODE[node.op_type](node)


def dequantise(model: ir.Model, nodes: Sequence[ir.Node]) -> None:
    """Gives layers their weights as plain numbers, in place.

    Before -> after: ``MatMulNBits(x, q, scale)  ->  MatMul(x, W)``, behind which a bias is added,
    MatMulBnb4 likewise, ``GatherBlockQuantized(q, ids, scale)  ->  Gather(W, ids)``, and
    ``MatMul(x, DequantizeLinear(q, scale))  ->  MatMul(x, W)``.

    Args:
        model: the model.
        nodes: of the layers, all of which are known.
    """
    for node in nodes:
        if node.op_type in _OF_NODE:
            name, values = f"{node.outputs[0].name}_float", weight_and_step(node)[0]
            looks_up, bias = node.op_type == LOOKUP, input_at(node, _BIAS)
            stored = ir.tensor(values.T.copy() if looks_up else values)
            weight = add_constant(model.graph, name, stored)
            node.replace_input_with(0 if looks_up else 1, weight)
            node.resize_inputs(2)
            node.attributes.clear()
            node.domain, node.op_type = "", "Gather" if looks_up else "MatMul"
            if bias is not None:
                add_behind(node, bias)
        elif (before := _before(node)) is not None:
            result = before.outputs[0]
            name, values = f"{result.name}_float", _of_linear(before)
            plain = add_constant(model.graph, name, ir.tensor(values))
            result.replace_all_uses_with(plain)


def _before(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear that gives a layer its weight; what is computed may come of one too."""
    for value in node.inputs[:2]:
        found = None if value is None else handed_on(value)[0].producer()
        if found is not None and found.op_type == "DequantizeLinear":
            whole = found.inputs[0]
            if whole is not None and whole.is_initializer():
                return found
    return None


def _of_bits(node: ir.Node) -> tuple[Array, Array]:
    """Of a product."""
    into, out, bits, block = (node.attributes[n].as_int() for n in ("K", "N", "bits", "block_size"))
    return _in_blocks(_array(node, 1), node, (out, into), bits, block)


def _of_rows(node: ir.Node) -> tuple[Array, Array]:
    """Of a lookup, whose rows may be what a head multiplies with."""
    given = node.attributes
    bits, block = given.get_int("bits", 4), given.get_int("block_size", DEFAULT_BLOCK)
    numbers = _array(node, 0)
    shape = len(numbers), numbers[0].size * 8 // bits
    return _in_blocks(numbers, node, shape, bits, block)


def _in_blocks(
    numbers: Array, node: ir.Node, shape: tuple[int, int], bits: int, block: int
) -> tuple[Array, Array]:
    """Blocks of one row of an output after the other, the low bits first."""
    scale, zero, (out, into) = _array(node, 2), _array_if_any(node, 3), shape
    count = -(-into // block)
    values = _unpacked(numbers.reshape(out, count, -1), bits)[..., :block]
    if zero is not None and zero.dtype == np.uint8:
        zero = _unpacked(zero.reshape(out, -1), bits)[:, :count]
    middle = 1 << bits - 1 if zero is None else zero.reshape(out, count, 1).astype(np.float32)
    wide = scale.reshape(out, count, 1).astype(np.float32)
    made = (values.astype(np.float32) - middle) * wide
    every = (made, np.broadcast_to(np.abs(wide), made.shape))
    made, step = (array.reshape(out, -1)[:, :into].T for array in every)
    return np.ascontiguousarray(made.astype(scale.dtype)), step


def _of_table(node: ir.Node) -> tuple[Array, Array]:
    """Blocks of the weight (out, in) as one row, the high bits first."""
    names = ("K", "N", "block_size", "quant_type")
    into, out, block, kind = (node.attributes[name].as_int() for name in names)
    packed, largest = _array(node, 1).reshape(-1), _array(node, 2).reshape(-1)
    places = np.stack([packed >> 4, packed & 15], -1).reshape(-1)[: into * out]
    spread = np.repeat(largest.astype(np.float32), block)[: into * out]
    gap = np.diff(np.sort(TABLES[kind])).max()
    every = (TABLES[kind][places] * spread, spread * gap)
    made, step = (array.reshape(out, into).T for array in every)
    return np.ascontiguousarray(made.astype(largest.dtype)), step


_OF_NODE: dict[str, Callable[[ir.Node], tuple[Array, Array]]] = {
    "MatMulNBits": _of_bits,
    "MatMulBnb4": _of_table,
    LOOKUP: _of_rows,
}


def _unpacked(values: Array, bits: int) -> Array:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    apart = values[..., None] >> shifts & (1 << bits) - 1
    return apart.reshape(*values.shape[:-1], -1)


def _of_linear(node: ir.Node) -> Array:
    """What a DequantizeLinear gives: by one scale, one along an axis, or one for each block."""
    values, scale = _array(node, 0).astype(np.float32), _array(node, 1)
    zero = _array_if_any(node, 2)
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


def _array_if_any(node: ir.Node, place: int) -> Array | None:
    return None if input_at(node, place) is None else _array(node, place)


def _array(node: ir.Node, place: int) -> Array:
    value = node.inputs[place]
    tensor = None if value is None else ir.convenience.get_const_tensor(blocks_of(value))
    assert tensor is not None
    return tensor.numpy()
