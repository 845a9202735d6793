"""The sum in front of a normalisation, which onnxruntime makes one slow operator of with it."""

from __future__ import annotations

import onnx_ir as ir

from lora_fx.export.spelling.rewrite import Spelling, producer, put

_NORMS = ("LayerNormalization", "RMSNormalization")


class SumResiduals(Spelling):
    """Says a sum that is normalised as Sum, with the bias of what is added.

    Before -> after: ``LayerNormalization(Add(Add(y, bias), x))`` ->
    ``LayerNormalization(Sum(y, bias, x))``, the same numbers in the same order. onnxruntime would
    run SkipLayerNormalization, which takes three times as long as the two apart.
    """

    what = "residuals added by Sum, which is not fused into SkipLayerNormalization"

    def respell(self, node: ir.Node) -> bool:
        """Of the norm that reads the sum."""
        add = producer(node.inputs[0], "Add") if node.op_type in _NORMS else None
        if add is None or add.outputs[0].dtype is not ir.DataType.FLOAT:
            return False
        one, other = add.inputs
        if one is None or other is None or one.is_initializer() or other.is_initializer():
            return False
        parts = _with_bias(one, other) or _with_bias(other, one) or (one, other)
        total = ir.node("Sum", parts)
        put(add, [total], total.outputs[0])
        return True


def _with_bias(y: ir.Value, x: ir.Value) -> tuple[ir.Value, ...] | None:
    """A product, its bias and what is added to them; a branch of an adapter stays apart."""
    add = producer(y, "Add")
    if add is None or len(y.uses()) != 1 or y.is_graph_output():
        return None
    for product, bias in (add.inputs, add.inputs[::-1]):
        is_bias = bias is not None and bias.is_initializer() and not bias.is_graph_input()
        if product is not None and bias is not None and is_bias and producer(product, "MatMul"):
            return product, bias, x
    return None
