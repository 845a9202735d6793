"""Convolutions without a bias, as torch.onnx writes them."""

from __future__ import annotations

import onnx_ir as ir

_PLACE = 2


def drop_made_biases(model: ir.Model) -> None:
    """Takes away the zeros that torch.onnx gives a convolution without a bias, in place.

    They cost a pass over the result, and those of a conv3d are of a shape that no runtime takes:
    (out, 2), with onnxscript 0.7.
    """
    for node in model.graph:
        if node.op_type == "Conv" and len(node.inputs) > _PLACE and _is_zeros(node.inputs[_PLACE]):
            node.resize_inputs(_PLACE)


def _is_zeros(value: ir.Value | None) -> bool:
    """Whether a value is a number 0, cast and expanded."""
    steps = ("Expand", "CastLike")
    for step in steps:
        node = value.producer() if value is not None else None
        if node is None or node.op_type != step:
            return False
        value = node.inputs[0]
    constant = ir.convenience.get_const_tensor(value) if value is not None else None
    return constant is not None and constant.size == 1 and not constant.numpy().any()
