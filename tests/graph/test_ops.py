from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx, nn

from lora_fx.graph.ops import call_argument, module_path, mutates, op_name


def single(build: Any) -> fx.Node:
    graph = fx.Graph()
    x = graph.placeholder("x")
    return build(graph, x)


@pytest.mark.parametrize(
    "target", [operator.matmul, torch.matmul, torch.ops.aten.matmul.default, "matmul"]
)
def test_one_operator_has_one_name(target: Any) -> None:
    kind = "call_method" if isinstance(target, str) else "call_function"
    node = single(lambda g, x: g.create_node(kind, target, (x, x)))
    assert op_name(node) == "matmul"


def test_overloads_modules_and_other_nodes() -> None:
    assert op_name(single(lambda g, x: g.call_function(torch.ops.aten.add.Tensor, (x, x)))) == "add"
    assert op_name(single(lambda g, x: x)) == "placeholder"
    graph = fx.Graph()
    call = graph.call_module("drop", (graph.placeholder("x"),))
    graph.output(call)
    fx.GraphModule({"drop": nn.Dropout(0.1)}, graph)
    assert op_name(call) == "dropout"


def test_arguments_by_place_or_by_name() -> None:
    node = single(lambda g, x: g.call_function(torch.addmm, (x,), {"mat1": 3}))
    assert call_argument(node, 1, "mat1") == 3
    assert call_argument(node, 2, "mat2", "none") == "none"
    assert module_path(node) == ""


@pytest.mark.parametrize(
    ("kind", "target", "kwargs", "writes"),
    [
        ("call_function", torch.ops.aten.add_.Tensor, {}, True),
        ("call_function", torch.ops.aten.add.Tensor, {}, False),
        ("call_function", operator.iadd, {}, True),
        ("call_function", operator.add, {}, False),
        ("call_function", operator.setitem, {}, True),
        ("call_function", torch.relu_, {}, True),
        ("call_function", nn.functional.relu, {"inplace": True}, True),
        ("call_function", nn.functional.relu, {"inplace": False}, False),
        ("call_function", torch.add, {"out": "y"}, True),
        ("call_method", "add_", {}, True),
        ("call_method", "add", {}, False),
        ("call_method", "__add__", {}, False),
        ("call_method", "__setitem__", {}, True),
    ],
)
def test_calls_that_write_are_known(kind: str, target: Any, kwargs: Any, writes: bool) -> None:
    node = single(lambda g, x: g.create_node(kind, target, (x, x), kwargs))
    assert mutates(node) == writes


def test_a_module_that_writes_in_place_is_known() -> None:
    for inplace in (True, False):
        model = nn.Sequential(nn.ReLU(inplace=inplace))
        gm = fx.symbolic_trace(model)
        relu = next(n for n in gm.graph.nodes if n.op == "call_module")
        assert mutates(relu) == inplace
