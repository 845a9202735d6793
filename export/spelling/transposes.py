"""Fuses Reshape, Transpose and Reshape of attention's keys into one Transpose."""

from __future__ import annotations

import onnx_ir as ir

from lora_fx.export.spelling.rewrite import Spelling, producer, put
from lora_fx.export.spelling.sizes import shape_of, sizes_in


class TransposeOnce(Spelling):
    """Turns keys by one call.

    Before -> after: ``Reshape(Transpose(Reshape(x, [-1, s, d]), [0, 2, 1]), [*b, d, s])`` ->
    ``Transpose(x)``, its last axes exchanged, in one with a Transpose that gives x.
    """

    what = "keys transposed in one step"

    def respell(self, node: ir.Node) -> bool:
        """Of the last Reshape."""
        turned = producer(node.inputs[0], "Transpose") if node.op_type == "Reshape" else None
        flat = producer(turned.inputs[0], "Reshape") if turned is not None else None
        if turned is None or flat is None or turned.attributes["perm"].as_ints() != (0, 2, 1):
            return False
        x = flat.inputs[0]
        shape, inner, outer = shape_of(x), sizes_in(flat.inputs[1]), sizes_in(node.inputs[1])
        if x is None or shape is None or inner is None or len(shape) < 2:
            return False
        *leading, rows, columns = shape
        if inner[1:] != (rows, columns) or outer != (*leading, columns, rows):
            return False
        before = producer(x, "Transpose")
        axes = before.attributes["perm"].as_ints() if before else tuple(range(len(shape)))
        order = (*axes[:-2], axes[-1], axes[-2])
        source = x if before is None else before.inputs[0]
        new = ir.node("Transpose", [source], {"perm": order})
        put(node, [new], new.outputs[0])
        return True
