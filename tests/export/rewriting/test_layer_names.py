"""Paths of layers in a file, from what its nodes and parameters are called."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from lora_fx.errors import ExportError
from lora_fx.export.rewriting.file_layers import layers_in
from lora_fx.export.rewriting.layer_names import check_one, named_layers

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


@pytest.mark.parametrize(("turned", "wanted"), [("table", "head"), ("fc", "fc")])
def test_a_table_that_a_tool_turned_for_a_head_is_the_table_s_by_its_name(
    turned: str, wanted: str
) -> None:
    """As onnxruntime does once for all readers, and calls it after the table."""
    source = np.random.default_rng(0)
    table = ir.val(
        "table.weight", const_value=ir.tensor(source.standard_normal((7, 4)).astype(np.float32))
    )
    other = ir.val(
        f"{turned}.weight_transposed",
        const_value=ir.tensor(source.standard_normal((4, 7)).astype(np.float32)),
    )
    ids = ir.val("ids", ir.DataType.INT64, (2,))
    rows = ir.node("Gather", [table, ids], name="/table/Gather")
    product = ir.node("MatMul", [rows.outputs[0], other], name="/head/MatMul")
    graph = ir.Graph(
        [ids], product.outputs, nodes=[rows, product], initializers=[table, other],
        opset_imports={"": 20},
    )  # fmt: skip
    found, _ = named_layers(list(layers_in(ir.Model(graph, ir_version=10))), {})
    assert {path: [c.kind for c in calls] for path, calls in found.items()} == {
        "table": ["embedding"], wanted: ["linear"],
    }  # fmt: skip


@pytest.mark.parametrize("size", [32, 64])
def test_a_second_call_of_what_a_tool_packed_once_is_not_taken_for_another_layer(size: int) -> None:
    """Its weight cannot be told from that of a few bits, but for its shape."""
    x = ir.val("x", ir.DataType.FLOAT, (2, 32))
    plain = ir.val("w", const_value=ir.tensor(np.ones((32, size), np.float32)))
    packed = ir.val("w_Q4", const_value=ir.tensor(np.zeros((32, 1, 16), np.uint8)))
    scales = ir.val("w_s", const_value=ir.tensor(np.ones(32, np.float32)))
    first = ir.node(
        "MatMulNBits", [x, packed, scales], {"K": 32, "N": 32, "bits": 4, "block_size": 32},
        name="/fc/MatMul_Q4", domain="com.microsoft",
    )  # fmt: skip
    second = ir.node("MatMul", [first.outputs[0], plain], name="/fc_1/MatMul")
    made, held = [first, second], [packed, scales, plain]
    opsets = {"": 20, "com.microsoft": 1}
    graph = ir.Graph([x], second.outputs, nodes=made, initializers=held, opset_imports=opsets)
    every = list(layers_in(ir.Model(graph, ir_version=10)))
    assert [layer.quantised for layer in every] == [True, False]
    if size == 32:
        with pytest.raises(ExportError, match=r"fc: two layers of one name.*names="):
            check_one("fc", named_layers(every, {})[0]["fc"])
    else:
        assert [*named_layers(every, {})[0]] == ["fc", "fc_1"]


# What adds the bias of the first of two products, what it reads -> the layers' paths.
READERS = {
    "a sum": ([("Add", "y0 fc.bias")], {"fc"}),
    "of the product itself": ([("Gemm", "x w2 fc.bias")], {"fc"}),
    "of two products": ([("Gemm", "x w2 fc.bias"), ("Add", "y0 fc.bias")], set()),
    "fused with a function": ([("FastGelu", "y0 fc.bias")], {"fc"}),
    "fused with a norm": ([("SkipLayerNormalization", "y0 x gain fc.bias fc.bias")], {"fc"}),
    "the norm's own": ([("SkipLayerNormalization", "y0 x gain norm.bias")], set()),
    "of one of two products": ([("SkipLayerNormalization", "y0 y1 gain gain fc.bias")], set()),
    "zeros that two layers share": ([("Add", "y0 fc.bias"), ("Add", "y1 fc.bias")], set()),
}


@pytest.mark.parametrize("name", READERS)
def test_a_bias_tells_whose_product_it_is_added_to(name: str) -> None:
    readers, wanted = READERS[name]
    held = {
        n: ir.val(n, const_value=ir.tensor(np.ones(4, np.float32)))
        for n in ("gain", "fc.bias", "norm.bias")
    }
    weights = [
        ir.val(f"w{n}", const_value=ir.tensor(np.full((4, 4), n, np.float32))) for n in (1, 2)
    ]
    x = ir.val("x", ir.DataType.FLOAT, (2, 4))
    products = [ir.node("MatMul", [x, weight]) for weight in weights]
    known = {"x": x, "y0": products[0].outputs[0], "y1": products[1].outputs[0], **held}
    known["w2"] = weights[1]
    made = [ir.node(kind, [known[n] for n in reads.split()]) for kind, reads in readers]
    graph = ir.Graph(
        [x], [node.outputs[0] for node in made], nodes=[*products, *made],
        initializers=[*held.values(), *weights], opset_imports={"": 20},
    )  # fmt: skip
    assert set(named_layers(list(layers_in(ir.Model(graph, ir_version=10))), {})[0]) == wanted
