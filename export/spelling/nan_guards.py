"""Puts a guard against NaN behind a softmax where a row of the mask may be all -inf."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lora_fx.export.onnx_model.eager_numbers import MASKED, WIDE
from lora_fx.export.spelling.bounds import bounds_of, dtype_of
from lora_fx.export.spelling.rewrite import producer, put


def guard_empty_rows(model: ir.Model) -> None:
    """Lets marked attention give 0 where its mask hides every key, as eager does, and no NaN.

    Before -> after: ``MatMul(p, v)`` -> ``Where(IsNaN(ReduceSum(p)), 0, MatMul(p, v))`` of ``p =
    Softmax(q @ k + mask)``. It stays as it is where all that is added to the products is greater
    than -inf, whatever the inputs are. So does the one operator, which gives 0 there by itself.
    """
    for last in list(model.graph):
        if last.op_type == "MatMul" and MASKED in last.metadata_props:
            softmax, dtype = producer(last.inputs[0], "Softmax"), dtype_of(last.outputs[0])
            if softmax is not None and dtype and not _has_numbers(softmax.inputs[0], dtype):
                _guard(last, softmax.outputs[0], dtype)


def _guard(last: ir.Node, weights: ir.Value, dtype: ir.DataType) -> None:
    """A softmax gives NaN for a row as a whole, so that its sum tells."""
    zero = ir.node("Constant", [], {"value": ir.tensor(np.zeros((), dtype.numpy()), dtype)})
    axis = ir.node("Constant", [], {"value": ir.tensor(np.array([-1]))})
    total = ir.node("ReduceSum", [weights, axis.outputs[0]])
    test = ir.node("IsNaN", [total.outputs[0]])
    product = ir.node("MatMul", last.inputs)
    safe = ir.node("Where", [test.outputs[0], zero.outputs[0], product.outputs[0]])
    put(last, [zero, axis, total, test, product, safe], safe.outputs[0])


def _has_numbers(value: ir.Value | None, dtype: ir.DataType | None) -> bool:
    """Whether no sum can hold -inf, unless products overflow."""
    # In half precision the least number and a small one have no sum: a row may be empty after all.
    if dtype not in WIDE:
        return False
    added = [part for part in _summands(value) if producer(part, "MatMul") is None]
    return sum(min(0.0, bounds_of(part).low) for part in added) >= float(dtype.min)


def _summands(value: ir.Value | None) -> list[ir.Value | None]:
    node = producer(value, "Add")
    return [value] if node is None else [part for v in node.inputs for part in _summands(v)]
