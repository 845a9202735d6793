"""The guard against NaN behind a softmax, where no row of the mask can be empty."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lora_fx.export.onnx_model.eager_numbers import MASKED
from lora_fx.export.spelling.bounds import bounds_of, dtype_of
from lora_fx.export.spelling.rewrite import Spelling, number, producer

# In half precision the least number and a small one have no sum: a row may be empty after all.
_WIDE = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


class DropNanGuards(Spelling):
    """Leaves out a guard that never acts.

    Before -> after: ``Where(IsNaN(p), 0, p)`` -> ``p``, of ``p = Softmax(Add(q @ k, mask))``. A row
    of which everything is -inf gives NaN. So the guard stays unless all that is added to the
    products is greater than that, whatever the inputs are: no mask at all, or the least number.
    """

    what = "softmax without a guard against NaN: no row of its mask can be empty"
    kept = "softmax with a guard against NaN: a row of its mask may be empty"

    def respell(self, node: ir.Node) -> bool:
        """Of a guard."""
        softmax = _guarded(node)
        if softmax is None or node.outputs[0].is_graph_output():
            return False
        if not _has_numbers(softmax.inputs[0], dtype_of(node.inputs[1])):
            self.left += 1
            return False
        node.outputs[0].replace_all_uses_with(softmax.outputs[0])
        test = node.inputs[0].producer() if node.inputs[0] is not None else None
        assert isinstance(node.graph, ir.Graph)
        node.graph.remove(node, safe=True)
        if test is not None and test.graph is not None and not test.outputs[0].uses():
            test.graph.remove(test, safe=True)
        return True


def guard_empty_rows(model: ir.Model) -> None:
    """Lets marked attention give 0 where its mask hides every key, as eager does, and no NaN.

    Before -> after: ``MatMul(Softmax(q @ k + mask), v)`` -> ``MatMul(Where(IsNaN(p), 0, p), v)`` of
    ``p = Softmax(q @ k + mask)``, as torch.onnx itself says it of masks of booleans. A row that no
    mask can hide whole stays, and so does the one operator, which gives 0 there by itself.
    """
    for last in list(model.graph):
        if last.op_type == "MatMul" and MASKED in last.metadata_props:
            softmax, dtype = producer(last.inputs[0], "Softmax"), dtype_of(last.outputs[0])
            if softmax is not None and dtype and not _has_numbers(softmax.inputs[0], dtype):
                _guard(last, softmax, dtype)


def _guarded(node: ir.Node) -> ir.Node | None:
    """The softmax that a node guards."""
    if producer(node.outputs[0], "Where") is None or number(node.inputs[1]) != 0:
        return None
    test, softmax = producer(node.inputs[0], "IsNaN"), producer(node.inputs[2], "Softmax")
    return softmax if test is not None and test.inputs[0] is node.inputs[2] else None


def _guard(last: ir.Node, softmax: ir.Node, dtype: ir.DataType) -> None:
    weights = softmax.outputs[0]
    zero = ir.node("Constant", [], {"value": ir.tensor(np.zeros((), dtype.numpy()), dtype)})
    test = ir.node("IsNaN", [weights])
    safe = ir.node("Where", [test.outputs[0], zero.outputs[0], weights])
    for node in (zero, test, safe):
        node.metadata_props.update(softmax.metadata_props)
    assert isinstance(last.graph, ir.Graph)
    last.graph.insert_before(last, [zero, test, safe])
    last.replace_input_with(0, safe.outputs[0])


def _has_numbers(value: ir.Value | None, dtype: ir.DataType | None) -> bool:
    """Whether no sum can hold -inf, unless products overflow."""
    if dtype is None or dtype not in _WIDE:
        return False
    added = [part for part in _summands(value) if producer(part, "MatMul") is None]
    return sum(min(0.0, bounds_of(part).low) for part in added) >= float(dtype.min)


def _summands(value: ir.Value | None) -> list[ir.Value | None]:
    node = producer(value, "Add")
    return [value] if node is None else [part for v in node.inputs for part in _summands(v)]
