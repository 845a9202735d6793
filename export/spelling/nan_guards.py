"""The guard against NaN behind a softmax, where no row of the mask can be empty."""

from __future__ import annotations

import onnx_ir as ir

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


def _guarded(node: ir.Node) -> ir.Node | None:
    """The softmax that a node guards."""
    if producer(node.outputs[0], "Where") is None or number(node.inputs[1]) != 0:
        return None
    test, softmax = producer(node.inputs[0], "IsNaN"), producer(node.inputs[2], "Softmax")
    return softmax if test is not None and test.inputs[0] is node.inputs[2] else None


def _has_numbers(value: ir.Value | None, dtype: ir.DataType | None) -> bool:
    """Whether no sum can hold -inf, unless products overflow."""
    if dtype is None or dtype not in _WIDE:
        return False
    added = [part for part in _summands(value) if producer(part, "MatMul") is None]
    return sum(min(0.0, bounds_of(part).low) for part in added) >= float(dtype.min)


def _summands(value: ir.Value | None) -> list[ir.Value | None]:
    node = producer(value, "Add")
    return [value] if node is None else [part for v in node.inputs for part in _summands(v)]
