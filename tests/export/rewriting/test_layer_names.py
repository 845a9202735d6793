"""Paths of layers in a file, from what its nodes and parameters are called."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import Update
from lora_fx.errors import ExportError
from lora_fx.export import Session, add_lora, export_adapter
from lora_fx.export.onnx_model.idle_work import without_idle_work
from lora_fx.export.rewriting.file_layers import FileLayer, layers_in
from lora_fx.export.rewriting.layer_names import apart, check_one, named_layers
from lora_fx.numerics import compare
from lora_fx.testing import make_adapter

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


@pytest.mark.parametrize("by", ["node", "weight"])
@pytest.mark.parametrize("is_equal", [True, False])
def test_a_second_call_may_have_an_equal_weight_of_its_own(is_equal: bool, by: str) -> None:
    """As tools leave a shared weight that they rewrite once for each reader, or put in twice."""
    x = value = ir.val("x", ir.DataType.FLOAT, (2, 4))
    made, initializers = [], []
    for place, scope in enumerate(("fc", "fc_1")):
        numbers = np.full((4, 4), 1 if is_equal else 1 + place, np.float32)
        names = {"node": (f"/{scope}/MatMul", f"onnx::MatMul_{place}")}
        names["weight"] = "", f"fc.weight_{place}" if place else "fc.weight"
        own = ir.val(names[by][1], const_value=ir.tensor(numbers))
        initializers.append(own)
        made.append(ir.node("MatMul", [value, own], name=names[by][0]))
        value = made[-1].outputs[0]
    graph = ir.Graph([x], [value], nodes=made, initializers=initializers, opset_imports={"": 20})
    found, nameless = named_layers(list(layers_in(ir.Model(graph, ir_version=10))), {})
    calls = {path: len(layers) for path, layers in found.items()}
    apart = {"fc": 1, "fc_1": 1} if by == "node" else {"fc": 1}
    assert calls == ({"fc": 2} if is_equal else apart)
    assert nameless == ([] if is_equal or by == "node" else ["fc.weight_1"])


def test_a_name_that_a_tool_gave_is_no_path_below_a_module() -> None:
    """As optimum names what two branches have in common."""
    x = value = ir.val("x", ir.DataType.FLOAT, (2, 4))
    own = ir.val("one.weight_merged", const_value=ir.tensor(np.ones((4, 4), np.float32)))
    made = []
    for scope in ("one", "other"):
        made.append(ir.node("MatMul", [value, own], name=f"/{scope}/MatMul"))
        value = made[-1].outputs[0]
    graph = ir.Graph([x], [value], nodes=made, initializers=[own], opset_imports={"": 20})
    found, nameless = named_layers(list(layers_in(ir.Model(graph, ir_version=10))), {})
    assert list(found) == ["one", "other"]
    assert not nameless


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


class Scaled(nn.Embedding):
    """A table of a class of its own, as some models have it."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 2


class TwoTables(nn.Module):
    """Two tables and a head of one weight, which bears the head's name."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 7, bias=False)
        self.one, self.other = Scaled(7, 5), Scaled(7, 5)
        self.one.weight = self.other.weight = self.head.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.head(torch.tanh(self.one(ids)) + self.other(ids.flip(-1)))
        return made


class HeadLast(TwoTables):
    """The weight bears the name of the first that has it, or of the last."""

    def __init__(self) -> None:
        super().__init__()
        head = self._modules.pop("head")
        self.head = head


class OneTable(TwoTables):
    """One of them, and the head, of which the exporter makes a constant of its own."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.head(torch.tanh(self.one(ids)))
        return made


class Copies(nn.Module):
    """Layers that torch copies: before they are trained, exporters store their weights once."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0, batch_first=True)
        self.all = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.all(x)
        return made


OF_COPIES = {
    f"all.layers.{layer}.{name}": shape
    for layer in (0, 1)
    for name, shape in {
        "self_attn": (24, 8), "self_attn.out_proj": (8, 8), "linear1": (12, 8), "linear2": (8, 12),
    }.items()
}  # fmt: skip
OF_TABLES = {"head": (7, 5), "one": (5, 7), "other": (5, 7)}
SHARED = {
    "tables": (TwoTables, torch.tensor([1, 4, 0]), OF_TABLES),
    "tables, and a head behind": (HeadLast, torch.tensor([[1, 4, 0]]), OF_TABLES),
    "a table": (OneTable, torch.tensor([1, 4, 0]), {"head": (7, 5), "one": (5, 7)}),
    "copies": (Copies, torch.linspace(-1, 1, 48).reshape(2, 3, 8) ** 3, OF_COPIES),
}


@pytest.mark.parametrize("how", ["torchscript", "dynamo", "as it is", "ours"])
@pytest.mark.parametrize("case", SHARED)
def test_a_weight_that_is_stored_once_is_of_each_module_that_calls_it(
    case: str, how: str, tmp_path: Path
) -> None:
    """Attention's first matrix is the module's own, whatever an exporter leaves of its name."""
    make, x, shapes = SHARED[case]
    torch.manual_seed(0)
    model = make().eval()
    base, out = tmp_path / "base.onnx", tmp_path / "slots.onnx"
    options = {"optimize": how != "as it is"} if how != "torchscript" else {"opset_version": 17}
    if how == "ours":
        lora_fx.to_onnx(lora_fx.trace(model, (x,)), base)
    else:
        with warnings.catch_warnings(), without_idle_work():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model, (x,), str(base), dynamo=how != "torchscript", verbose=False, **options
            )  # type: ignore[arg-type]
    assert set(add_lora(base, out, slots=["*"]).slots) == set(shapes)
    session = Session(out)
    for path, shape in shapes.items():
        adapter, file = make_adapter({path: shape}, scale=0.3), tmp_path / f"{path}.onnx_adapter"
        export_adapter(adapter, out, file)
        (found,) = session.run({session.inputs[0]: x}, file).values()
        apart, update = copy.deepcopy(model), cast(Update, adapter.updates[path])
        layer: Any = apart.get_submodule(path)
        name = "weight" if hasattr(layer, "weight") else "in_proj_weight"
        delta = update.delta().T if isinstance(layer, nn.Embedding) else update.delta()
        setattr(layer, name, nn.Parameter(getattr(layer, name).detach() + delta))
        with torch.no_grad():
            assert compare(found, apart(x)).ok
            assert not compare(found, model(x)).ok


def test_calls_of_one_path_or_of_one_weight_are_told_apart() -> None:
    one, other = (ir.val(f"onnx::{n}", const_value=ir.tensor(np.eye(2))) for n in "ab")
    nodes = [ir.node("MatMul", [], name=f"m{n}") for n in range(4)]
    kinds = ("embedding", "linear", "linear", "linear")
    weights = (one, one, other, other)
    rows = zip(nodes, weights, kinds, strict=True)
    calls = [FileLayer(node, weight, kind, (2, 2), "float32") for node, weight, kind in rows]
    nameless = {"onnx::a": calls[:1], "onnx::a (linear)": calls[1:2], "onnx::b": calls[2:]}
    assert apart(calls, {}) == nameless
    of_one_path = {"m": calls[:1], "onnx::a": calls[1:2], "onnx::b": calls[2:]}
    assert apart(calls, dict.fromkeys(nodes, "m")) == of_one_path
