"""Fuses root-mean-square normalisation into RMSNormalization of opset 23."""

from __future__ import annotations

import onnx_ir as ir

from lora_fx.export.spelling.rewrite import Spelling, number, producer, put
from lora_fx.export.spelling.sizes import shape_of


class FuseRmsNorm(Spelling):
    """Says the five steps and the weight as one.

    Before -> after: ``w * (x * Reciprocal(Sqrt(ReduceMean(Pow(x, 2)) + eps)))`` ->
    ``RMSNormalization(x, w)``, over the last axis.
    """

    since = 23
    what = "norms by one operator, RMSNormalization of opset 23"

    def respell(self, node: ir.Node) -> bool:
        """Of the product with the weight."""
        if producer(node.outputs[0], "Mul") is None:
            return False
        for weight, normed in (node.inputs, node.inputs[::-1]):
            found = _normed(normed)
            if found is not None and weight is not None and _is_weight(weight, found[0]):
                x, epsilon = found
                new = ir.node("RMSNormalization", [x, weight], {"epsilon": epsilon, "axis": -1})
                put(node, [new], new.outputs[0])
                return True
        return False


def _is_weight(weight: ir.Value, x: ir.Value) -> bool:
    sizes, whole = shape_of(weight), shape_of(x)
    same_type = weight.dtype is x.dtype is ir.DataType.FLOAT
    return bool(same_type and sizes and whole and sizes == whole[-1:])


def _normed(value: ir.Value | None) -> tuple[ir.Value, float] | None:
    """What is divided by its root mean square, and what is added to the mean."""
    scaled = producer(value, "Mul")
    if scaled is None or scaled.outputs[0].is_graph_output():
        return None
    for x, factor in (scaled.inputs, scaled.inputs[::-1]):
        inverse = producer(factor, "Reciprocal")
        root = producer(inverse.inputs[0], "Sqrt") if inverse is not None else None
        total = producer(root.inputs[0], "Add") if root is not None else None
        mean = producer(total.inputs[0], "ReduceMean") if total is not None else None
        square = producer(mean.inputs[0], "Pow") if mean is not None else None
        if total is None or mean is None or square is None or square.inputs[0] is not x:
            continue
        epsilon, is_square = number(total.inputs[1]), number(square.inputs[1]) == 2
        is_last = number(mean.inputs[1]) == -1 and mean.attributes.get_int("keepdims", 1) == 1
        if x is not None and epsilon is not None and is_square and is_last:
            return x, epsilon
    return None
