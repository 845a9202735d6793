from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.export.onnx_model.convert import convert
from lora_fx.export.onnx_model.optimize import (
    DropMadeBiases,
    StoreTransposed,
    anonymise,
    clean,
)
from lora_fx.export.onnx_model.tied import MultiplyTied
from lora_fx.frontend.torch_export import export_program
from lora_fx.frontend.trace import trace
from lora_fx.testing import Tied, relative


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.fc(x)))


def cleaned(module: nn.Module, *args: Any) -> ir.Model:
    gm = trace(module.eval(), args)
    model = convert(export_program(gm, args, {}, None), None)
    clean(model)
    anonymise(model)
    return model


def shown(model: ir.Model) -> list[str]:
    return [f"{n.op_type}({', '.join(v.name or '' for v in n.inputs if v)})" for n in model.graph]


def test_a_transposed_weight_is_stored_as_it_is_read_under_its_name() -> None:
    module = nn.Sequential(nn.Linear(3, 5))
    model = cleaned(module, torch.randn(4, 7, 3))
    assert shown(model) == ["MatMul(input, 0.weight)", "Add(val_1, 0.bias)"]
    stored = model.graph.initializers["0.weight"].const_value
    assert isinstance(stored, ir.LazyTensor)
    assert torch.equal(torch.from_numpy(stored.numpy()), module[0].weight.detach().T)


def test_a_layer_called_twice_shares_one_stored_weight() -> None:
    model = cleaned(Twice(), torch.randn(4, 7, 5))
    assert list(model.graph.initializers) == ["fc.weight"]
    assert shown(model) == ["MatMul(x, fc.weight)", "Relu(linear)", "MatMul(relu, fc.weight)"]


def test_a_tied_weight_stays_as_it_is_and_is_multiplied_where_it_lies() -> None:
    model = cleaned(Tied(), torch.randint(0, 6, (4, 7)))
    floats = [n for n, v in model.graph.initializers.items() if v.dtype == ir.DataType.FLOAT]
    assert floats == ["table.weight"]
    assert [
        n.op_type for n in model.graph if n.inputs[1:2] == (model.graph.initializers[floats[0]],)
    ] == ["Gemm"]


def test_arithmetic_on_weights_is_not_evaluated() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.weight / self.weight.norm(dim=0))

    model = cleaned(Normed(), torch.randn(4, 7, 3))
    assert [n for n, v in model.graph.initializers.items() if v.shape and len(v.shape) == 2] == [
        "weight"
    ]


def test_nothing_of_the_tracer_is_left() -> None:
    model = cleaned(Twice(), torch.randn(4, 7, 5))
    values = [value for node in model.graph for value in node.outputs]
    values += [*model.graph.inputs, *model.graph.initializers.values()]
    for thing in (model, model.graph, *model.graph, *values):
        assert not thing.metadata_props
        assert not thing.doc_string


@pytest.mark.parametrize("module", [Tied(), Twice()])
def test_a_second_run_changes_nothing(module: nn.Module) -> None:
    x = torch.randint(0, 6, (4, 7)) if isinstance(module, Tied) else torch.randn(4, 7, 5)
    model = cleaned(module, x)
    before = shown(model)
    clean(model)
    assert shown(model) == before
    steps = (DropMadeBiases(), StoreTransposed(), MultiplyTied())
    assert not any(step(model).modified for step in steps)


class HandsOn(nn.Module):
    """One branch gives what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = (lambda y: y.clone()), (lambda y: y * 2.0)
        return torch.tanh(torch.cond(x.sum() > 0, *branches, (self.fc(x),)))  # type: ignore[no-any-return]


def test_a_branch_may_hand_on_what_it_was_given(tmp_path: Path) -> None:
    module, x = HandsOn().eval(), torch.ones(2, 4)
    lora_fx.to_onnx(trace(module, (x,)), tmp_path / "m.onnx")
    session = lora_fx.Session(tmp_path / "m.onnx", threads=1)
    for given in (x, -x):
        found = torch.from_numpy(session.run({"x": given})[session.outputs[0]])
        y, is_first = module.fc(given).detach(), given is x
        assert relative(found, torch.tanh(y if is_first else y * 2)) < 1e-6
        assert relative(found, torch.tanh(y * 2 if is_first else y)) > 0.1


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_without_a_bias_has_none_in_onnx(
    dims: int, bias: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    layer = kind(4, 6, (3, 2, 1)[:dims], bias=bias).eval()
    x = torch.randn(2, 4, *(7, 8, 5)[:dims])
    path = tmp_path / "m.onnx"
    lora_fx.to_onnx(lora_fx.trace(layer, (x,)), path)
    (node,) = (n for n in onnx.load(path).graph.node if n.op_type == "Conv")
    assert len(node.input) == 2 + bias
    (outputs,) = lora_fx.Session(path).run({"input": x}).values()
    with torch.no_grad():
        assert relative(torch.from_numpy(outputs), layer(x)) <= 1e-5
        assert relative(torch.from_numpy(outputs), layer(x) + 0.1) > 1e-2


@pytest.mark.parametrize("adapters", ["constant", "input"])
def test_a_bias_of_the_model_stays_though_it_is_zero(adapters: str, tmp_path: Path) -> None:
    layer = nn.Sequential(nn.Conv2d(4, 6, (3, 2)), nn.Conv2d(6, 5, 1, bias=False)).eval()
    nn.init.zeros_(layer[0].bias)
    gm = lora_fx.trace(layer, (torch.randn(2, 4, 7, 8),))
    slots = {"slots": ["0", "1"]} if adapters == "input" else {}
    assert lora_fx.to_onnx(gm, tmp_path / "m.onnx", adapters=adapters, **slots).verified
    graph = onnx.load(tmp_path / "m.onnx").graph
    inputs = [list(node.input)[1:] for node in graph.node if node.op_type == "Conv"]
    assert ["0.weight", "0.bias"] in inputs
    assert sum(len(names) == 2 for names in inputs) == 1  # no slot has a made one either
    assert not any(node.op_type in ("Expand", "CastLike") for node in graph.node)
