"""Weights of an ONNX file that get no slot: multiplied by another operator, or in parts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import onnx_ir as ir

from lora_fx.errors import shorten
from lora_fx.export.rewriting.file_layers import FileLayer

_LINEAR = {
    "Attention", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "Einsum", "FusedGemm",
    "FusedMatMul", "GRU", "Gemm", "LSTM", "MatMul", "MatMulBnb4", "MatMulInteger",
    "MatMulIntegerToFloat", "MatMulNBits", "MoE", "PackedAttention", "QAttention", "QGemm",
    "QLinearMatMul", "QMoE", "RNN",
}  # fmt: skip
_CONVOLUTIONS = {
    "Conv", "ConvInteger", "ConvTranspose", "FusedConv", "QLinearConv",
}  # fmt: skip
_A_LAYER = "a layer is a plain product or convolution with one whole weight"
# What a weight may be computed by, of stored values alone.
_COMPUTED_BY = {
    "Cast", "Concat", "DequantizeLinear", "Div", "Einsum", "Expand", "Identity", "Mul", "Reshape",
    "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip


def unopened(model: ir.Model, layers: Collection[ir.Node], linear: bool = False) -> str:
    """Says which nodes multiply with a stored weight beside the layers of a file; nothing if none.

    Of a file without layers, what it computes with instead.

    Args:
        model: the file.
        layers: the nodes of its layers.
        linear: leave out convolutions.
    """
    kinds = _LINEAR if linear else _LINEAR | _CONVOLUTIONS
    found = [
        f"{node.op_type} {node.name or node.outputs[0].name} ({', '.join(weights)})"
        for node in model.graph.all_nodes()
        if node.op_type in kinds and node not in layers and (weights := list(_weights(node)))
    ]
    if not found:
        used = list(dict.fromkeys(node.op_type for node in model.graph.all_nodes()))
        return "" if layers else f"it computes with {shorten(used) or 'nothing'}: {_A_LAYER}"
    return (
        f"no slot can stand beside {shorten(found)}: {_A_LAYER}: give the file as it was "
        "before it was quantised or fused, or export the model itself"
    )


def clipped(chosen: Mapping[str, Sequence[FileLayer]]) -> str:
    """Says which layers give what is stored in a range that knew no adapter; nothing if none."""
    found = [path for path, calls in chosen.items() if any(_is_clipped(c.node) for c in calls)]
    if not found:
        return ""
    return (
        f"{shorten(found)}: what they give is stored in a range that was calibrated without an "
        "adapter, and what one adds beyond that is cut off: put slots in first, and calibrate "
        "with CalibrationReader"
    )


def _is_clipped(node: ir.Node) -> bool:
    users = [user for user, _ in node.outputs[0].uses()]
    added = [user for n in users if n.op_type == "Add" for user, _ in n.outputs[0].uses()]
    return any(user.op_type == "QuantizeLinear" for user in users + added)


def _weights(node: ir.Node) -> Iterator[str]:
    """The names of the matrices that a node reads, stored or computed of what is."""
    for value in node.inputs:
        sources = _sources(value) if value is not None else None
        for source in sources or ():
            shape = () if source.shape is None else source.shape.numpy()
            if len(shape) > 1 and min(shape[-2:]) > 1:
                yield str(source.name)
                break


def _sources(value: ir.Value) -> list[ir.Value] | None:
    """The initializers that a value is computed of; None if it is of anything else too."""
    found, waiting = [], [value]
    while waiting:
        node = (value := waiting.pop()).producer()
        if value.is_initializer():
            found.append(value)
        elif node is None or node.op_type not in _COMPUTED_BY:
            return None
        else:
            waiting += [v for v in node.inputs if v is not None]
    return found
