"""A weight that is read as it is and transposed too, such as an embedding that is also the head."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

_FLOATS = {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16}


class MultiplyTied(ir.passes.InPlacePass):
    """Multiplies by such a weight where it lies.

    Before -> after: ``MatMul(x, Transpose(w))`` -> ``Gemm(x, w, transB=1)``, with all leading
    axes of x as one. onnxruntime would hold a transposed copy of the weight beside it.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the model."""
        found = [(node, weight) for node in model.graph if (weight := _weight(node)) is not None]
        products = [
            (use.node, weight)
            for node, weight in found
            for use in node.outputs[0].uses()
            if _is_product(use.node, node.outputs[0])
        ]
        for product, weight in products:
            _multiply(model, product, weight)
        for node, _ in found:
            if not node.outputs[0].uses():
                model.graph.remove(node, safe=True)
        return ir.passes.PassResult(model, bool(products))


def _weight(node: ir.Node) -> ir.Value | None:
    weight = node.inputs[0] if node.op_type == "Transpose" else None
    if weight is None or not weight.is_initializer() or weight.dtype not in _FLOATS:
        return None
    is_matrix = node.attributes["perm"].as_ints() == (1, 0)
    return weight if is_matrix and not node.outputs[0].is_graph_output() else None


def _is_product(node: ir.Node, weight: ir.Value) -> bool:
    x = node.inputs[0] if node.op_type == "MatMul" else None
    is_known = x is not None and x is not weight and x.shape is not None and x.shape.rank() > 1
    return is_known and node.inputs[1] is weight


def _multiply(model: ir.Model, product: ir.Node, weight: ir.Value) -> None:
    x, y, shape = product.inputs[0], product.outputs[0], weight.shape
    assert x is not None
    assert x.shape is not None
    assert shape is not None
    nodes: list[ir.Node] = []

    def call(kind: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        nodes.append(ir.node(kind, inputs, attributes))
        return nodes[-1].outputs[0]

    def sizes(*numbers: int) -> ir.Value:
        nodes.append(ir.node("Constant", [], {"value": ir.tensor(np.array(numbers, np.int64))}))
        return nodes[-1].outputs[0]

    if x.shape.rank() == 2:
        result = call("Gemm", x, weight, transB=1)
    else:
        rows = call("Reshape", x, sizes(-1, int(str(shape[1]))))
        leading = call("Shape", x, end=-1)
        wanted = call("Concat", leading, sizes(int(str(shape[0]))), axis=0)
        result = call("Reshape", call("Gemm", rows, weight, transB=1), wanted)
    result.type, result.shape = y.type, y.shape
    for node in nodes:
        node.metadata_props.update(product.metadata_props)  # whose module names them
    model.graph.insert_before(product, nodes)
    y.replace_all_uses_with(result, replace_graph_outputs=True)
    result.name = y.name
    model.graph.remove(product, safe=True)
