"""Keeps the residual sum apart from the norm behind it: onnxruntime fuses both into a slow one."""

from __future__ import annotations

import onnx_ir as ir

from lora_fx.export.spelling.rewrite import Spelling, producer, put

_NORMS = ("LayerNormalization", "RMSNormalization")


class SumResiduals(Spelling):
    """Says a sum that is normalised as Sum.

    Before -> after: ``LayerNormalization(Add(y, x))`` -> ``LayerNormalization(Sum(y, x))``.
    onnxruntime would run SkipLayerNormalization, which takes three times as long as the two apart.
    Biases stay in an Add of their own, by which tools, and `merge_onnx`, tell layers.
    """

    what = "residuals added by Sum, which is not fused into SkipLayerNormalization"

    def respell(self, node: ir.Node) -> bool:
        """Of the norm that reads the sum."""
        add = producer(node.inputs[0], "Add") if node.op_type in _NORMS else None
        if add is None or add.outputs[0].dtype is not ir.DataType.FLOAT:
            return False
        if any(value is None or value.is_initializer() for value in add.inputs):
            return False
        total = ir.node("Sum", add.inputs)
        put(add, [total], total.outputs[0])
        return True
