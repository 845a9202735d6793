"""Paths of layers in a file, from what its nodes and parameters are called."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from lora_fx.export.rewriting.file_layers import layers_in
from lora_fx.export.rewriting.layer_names import named_layers

# What nodes and the parameters beside them are called -> the paths of the layers.
FILES = {
    "a module that is not called itself": (
        {"/dec/0/fc/MatMul": "", "/dec/0/norm/Mul": "model.dec.0.norm.weight"},
        {"model.dec.0.fc"},
    ),
    "its like beside it": (
        {"/dec/0/fc/MatMul": "", "/dec/0/norm/Mul": "model.dec.0.norm.weight", "/head/MatMul": ""},
        {"model.dec.0.fc", "head"},
    ),
    "two of them, so neither": (
        {
            "/dec/0/fc/MatMul": "",
            "/dec/0/norm/Mul": "one.dec.0.norm.weight",
            "/dec/1/norm/Mul": "two.dec.1.norm.weight",
        },
        {"dec.0.fc"},
    ),
    "a tensor of another layer, shared as it is equal": (
        {"/dec/0/fc/MatMul": "", "/dec/0/fc/Add": "model.dec.1.fc.bias"},
        {"dec.0.fc"},
    ),
    "the same in both": (
        {"/dec/0/fc/MatMul": "", "/dec/0/norm/Mul": "dec.0.norm.weight"},
        {"dec.0.fc"},
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_scope_becomes_the_path_that_parameters_beside_it_have(name: str) -> None:
    nodes, wanted = FILES[name]
    x = value = ir.val("x", ir.DataType.FLOAT, (2, 4))
    made, initializers = [], []
    for place, (node, parameter) in enumerate(nodes.items()):
        scope, _, operator = node.rpartition("/")
        shape = (4, 4) if operator == "MatMul" else (4,)
        own = ir.val(
            parameter or f"onnx::MatMul_{place}",
            const_value=ir.tensor(np.ones(shape, np.float32)),
        )
        initializers.append(own)
        made.append(ir.node(operator, [value, own], name=f"{scope}/{operator}"))
        value = made[-1].outputs[0]
    graph = ir.Graph([x], [value], nodes=made, initializers=initializers, opset_imports={"": 20})
    found, nameless = named_layers(list(layers_in(ir.Model(graph, ir_version=10))), {})
    assert set(found) == wanted
    assert not nameless


@pytest.mark.parametrize("is_equal", [True, False])
def test_a_second_call_may_have_an_equal_weight_of_its_own(is_equal: bool) -> None:
    """As tools leave a shared weight that they rewrite once for each reader."""
    x = value = ir.val("x", ir.DataType.FLOAT, (2, 4))
    made, initializers = [], []
    for place, scope in enumerate(("fc", "fc_1")):
        numbers = np.full((4, 4), 1 if is_equal else 1 + place, np.float32)
        own = ir.val(f"onnx::MatMul_{place}", const_value=ir.tensor(numbers))
        initializers.append(own)
        made.append(ir.node("MatMul", [value, own], name=f"/{scope}/MatMul"))
        value = made[-1].outputs[0]
    graph = ir.Graph([x], [value], nodes=made, initializers=initializers, opset_imports={"": 20})
    found, _ = named_layers(list(layers_in(ir.Model(graph, ir_version=10))), {})
    calls = {path: len(layers) for path, layers in found.items()}
    assert calls == ({"fc": 2} if is_equal else {"fc": 1, "fc_1": 1})
