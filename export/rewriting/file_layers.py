"""The layers of an ONNX file: nodes that multiply with a stored weight, or look up its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from lora_fx.export.onnx_model.tensor_protos import MICROSOFT
from lora_fx.export.rewriting.weight_reads import source_of

_DTYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.DOUBLE: "float64",
}


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
    """The layers of a file, in the order of its graph."""
    for node in model.graph:
        find = _FINDERS.get((node.domain if node.domain != "ai.onnx" else "", node.op_type))
        found = None if find is None else find(node)
        if found is not None:
            yield found


def _matrix(node: ir.Node) -> FileLayer | None:
    x_is_constant = node.inputs[0] is not None and source_of(node.inputs[0])[0] is not None
    is_gemm = node.op_type == "Gemm"
    plain = node.attributes.get_float("alpha", 1.0) == 1.0 and not node.attributes.get_int(
        "transA", 0
    )
    found = _stored(node, 1)
    if found is None or x_is_constant or (is_gemm and not plain):
        return None
    weight, scale, turned, sizes = found
    if len(sizes) != 2:
        return None
    turned ^= not (is_gemm and bool(node.attributes.get_int("transB", 0)))
    into, out = sizes if turned else sizes[::-1]
    return _layer(node, weight, scale, "linear", (out, into), turned=turned)


def _bits(node: ir.Node) -> FileLayer | None:
    weight, scale = node.inputs[1], node.inputs[2]
    if weight is None or scale is None or not weight.is_initializer():
        return None
    shape = node.attributes.get_int("N"), node.attributes.get_int("K")
    return _layer(node, weight, scale, "linear", (shape[0] or 0, shape[1] or 0))


def _convolution(node: ir.Node) -> FileLayer | None:
    found, groups = _stored(node, 1), node.attributes.get_int("group", 1) or 1
    if found is None or found[2] or not 3 <= len(found[3]) <= 5:
        return None
    weight, scale, _, (out, into, *kernel) = found
    shape = out, into * groups, *kernel
    return _layer(node, weight, scale, f"conv{len(kernel)}d", shape, groups)


def _table(node: ir.Node) -> FileLayer | None:
    found, ids = _stored(node, 0), node.inputs[1]
    is_rows = not node.attributes.get_int("axis", 0) and ids is not None
    if found is None or not is_rows or ids is None or ids.is_initializer() or len(found[3]) != 2:
        return None
    weight, scale, turned, sizes = found
    rows, width = sizes[::-1] if turned else sizes
    return _layer(node, weight, scale, "embedding", (width, rows), turned=turned)


_FINDERS: dict[tuple[str, str], Callable[[ir.Node], FileLayer | None]] = {
    ("", "MatMul"): _matrix,
    ("", "Gemm"): _matrix,
    (MICROSOFT, "MatMulNBits"): _bits,
    (MICROSOFT, "MatMulBnb4"): _bits,
    ("", "Conv"): _convolution,
    ("", "Gather"): _table,
}


def _stored(
    node: ir.Node, place: int
) -> tuple[ir.Value, ir.Value | None, bool, tuple[int, ...]] | None:
    """A weight, the scale that it is dequantised by, if it is turned round, and its own shape."""
    value = node.inputs[place] if len(node.inputs) > place else None
    if value is None:
        return None
    scale, outer = None, False
    source, turned, in_parts = source_of(value)
    if source is None and (quantised := _dequantised(value)) is not None:
        outer, (inner, scale) = quantised[0], quantised[1:]
        source, turned, in_parts = source_of(inner)
    if source is None or in_parts or source.shape is None or not source.shape.is_static():
        return None
    return source, scale, turned ^ outer, tuple(source.shape.numpy())


def _dequantised(value: ir.Value) -> tuple[bool, ir.Value, ir.Value] | None:
    """What a value dequantises, and by which scale; whether it is turned round afterwards."""
    node, turned = value.producer(), False
    if node is not None and node.op_type == "Transpose" and node.inputs[0] is not None:
        node, turned = node.inputs[0].producer(), True
    if node is None or node.op_type != "DequantizeLinear":
        return None
    whole, scale = node.inputs[0], node.inputs[1]
    return None if whole is None or scale is None else (turned, whole, scale)


def _layer(
    node: ir.Node,
    weight: ir.Value,
    scale: ir.Value | None,
    kind: str,
    shape: tuple[int, ...],
    groups: int = 1,
    turned: bool = False,
) -> FileLayer | None:
    number = scale if scale is not None else weight
    dtype = _DTYPES.get(number.dtype) if number.dtype is not None else None
    if dtype is None or any(size < 1 for size in shape):
        return None
    return FileLayer(node, weight, kind, shape, dtype, groups, turned, scale is not None)
