"""The layers of an ONNX file: nodes that multiply with a stored weight, or look up its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from lora_fx.export.onnx_model.tensor_protos import MICROSOFT
from lora_fx.export.rewriting.merged_tensor import MergedTensor
from lora_fx.export.rewriting.weight_reads import (
    blocks_of,
    handed_on,
    input_at,
    looks_up_rows,
    type_of,
)
from lora_fx.export.slots import manifest

DTYPES = {kind: name for name, kind in manifest.DTYPES.items()}


@dataclass(frozen=True)
class FileLayer:
    """A call of a layer.

    Attributes:
        node: what calls it.
        weight: the initializer.
        kind: ``"linear"``, ``"embedding"``, ``"conv1d"``, ...
        shape: (out, in, *kernel), in of all groups.
        dtype: of what it computes with: ``"float32"``.
        groups: of a convolution.
        turned: whether the file stores the weight the other way than the kind does.
        quantised: whether it stores whole numbers in place of it.
    """

    node: ir.Node
    weight: ir.Value
    kind: str
    shape: tuple[int, ...]
    dtype: str
    groups: int = 1
    turned: bool = False
    quantised: bool = False


def layers_in(model: ir.Model) -> Iterator[FileLayer]:
    """The layers of a file, in the order of its graph, those in branches and loops too."""
    for node in model.graph.all_nodes():
        find = _FINDERS.get((node.domain if node.domain != "ai.onnx" else "", node.op_type))
        found = None if find is None else find(node)
        if found is not None:
            yield found


def types_of_numbers(model: ir.Model) -> set[str]:
    """The types that what a file computes is rounded by.

    Those that its weights are read in, and that a weight is stored in which was made anew.
    """
    weights = model.graph.initializers.values()
    found = {value.dtype for value in weights if isinstance(value.const_value, MergedTensor)}
    for value in weights:
        found |= {
            ir.DataType(node.attributes["to"].as_int()) if node.op_type == "Cast" else value.dtype
            for node, _ in value.uses()
        }
    return {name for dtype, name in DTYPES.items() if dtype in found}


def _matrix(node: ir.Node) -> FileLayer | None:
    is_gemm = node.op_type == "Gemm"
    plain = node.attributes.get_float("alpha", 1.0) == 1.0 and not node.attributes.get_int(
        "transA", 0
    )
    found = _stored(node, 1)
    if found is None or (is_gemm and not plain):
        return None
    weight, quantised, turned, sizes = found
    if len(sizes) != 2:
        return None
    turned ^= not (is_gemm and bool(node.attributes.get_int("transB", 0)))
    into, out = sizes if turned else sizes[::-1]
    return _layer(
        node, weight, node.inputs[1], "linear", (out, into), turned=turned, quantised=quantised
    )


def _bits(node: ir.Node) -> FileLayer | None:
    weight, scale = node.inputs[1], node.inputs[2]
    if weight is None or scale is None or not weight.is_initializer():
        return None
    shape = node.attributes.get_int("N"), node.attributes.get_int("K")
    return _layer(node, weight, scale, "linear", (shape[0] or 0, shape[1] or 0), quantised=True)


def _convolution(node: ir.Node) -> FileLayer | None:
    found, groups = _stored(node, 1), node.attributes.get_int("group", 1) or 1
    if found is None or found[2] or not 3 <= len(found[3]) <= 5:
        return None
    weight, quantised, _, (out, into, *kernel) = found
    shape, kind = (out, into * groups, *kernel), f"conv{len(kernel)}d"
    return _layer(node, weight, node.inputs[1], kind, shape, groups, quantised=quantised)


def _table(node: ir.Node) -> FileLayer | None:
    found, ids = _stored(node, 0), node.inputs[1]
    if found is None or ids is None or ids.is_initializer() or len(found[3]) != 2:
        return None
    if not looks_up_rows(node):
        return None
    weight, quantised, turned, sizes = found
    rows, width = sizes[::-1] if turned else sizes
    return _layer(
        node, weight, node.inputs[0], "embedding", (width, rows), turned=turned, quantised=quantised
    )


def _rows_of_bits(node: ir.Node) -> FileLayer | None:
    """A lookup of rows in whole numbers, which a head may read in blocks."""
    given, numbers, scale = node.attributes, input_at(node, 0), input_at(node, 2)
    source = None if numbers is None else blocks_of(numbers)
    if source is None or not source.is_initializer() or node.inputs[1] is None or scale is None:
        return None
    if given.get_int("gather_axis", 0) or given.get_int("quantize_axis", 1) not in (1, -1):
        return None
    if source.shape is None or not source.shape.is_static():
        return None
    rows, *width = source.shape.numpy()
    each = 8 // (given.get_int("bits", 4) or 4) if source.dtype == ir.DataType.UINT8 else 1
    shape = (math.prod(width) * each, rows)
    return _layer(node, source, scale, "embedding", shape, quantised=True)


_FINDERS: dict[tuple[str, str], Callable[[ir.Node], FileLayer | None]] = {
    ("", "MatMul"): _matrix,
    ("", "Gemm"): _matrix,
    (MICROSOFT, "MatMulNBits"): _bits,
    (MICROSOFT, "MatMulBnb4"): _bits,
    (MICROSOFT, "GatherBlockQuantized"): _rows_of_bits,
    ("", "Conv"): _convolution,
    ("", "Gather"): _table,
}


def _stored(node: ir.Node, place: int) -> tuple[ir.Value, bool, bool, tuple[int, ...]] | None:
    """A weight, whether it is dequantised, and whether it is turned round, and its own shape."""
    value = input_at(node, place)
    if value is None:
        return None
    source, turned, in_parts = handed_on(value)
    before = source.producer()
    quantised = before is not None and before.op_type == "DequantizeLinear"
    if before is not None and quantised and before.inputs[0] is not None:
        source, turned_before, in_parts_before = handed_on(before.inputs[0])
        turned, in_parts = turned ^ turned_before, in_parts or in_parts_before
    if not source.is_initializer() or in_parts:
        return None
    if source.shape is None or not source.shape.is_static():
        return None
    return source, quantised, turned, tuple(source.shape.numpy())


def _layer(
    node: ir.Node,
    weight: ir.Value,
    number: ir.Value | None,
    kind: str,
    shape: tuple[int, ...],
    groups: int = 1,
    turned: bool = False,
    quantised: bool = False,
) -> FileLayer | None:
    read = None if number is None else type_of(number)
    dtype = DTYPES.get(read) if read is not None else None
    if dtype is None or any(size < 1 for size in shape):
        return None
    return FileLayer(node, weight, kind, shape, dtype, groups, turned, quantised)
