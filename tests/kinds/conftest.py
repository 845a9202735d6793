"""What every kind is held against: its definition, PEFT, LyCORIS, and the graph that records it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.fx.proxy import GraphAppendingTracer

from lora_fx.kinds import KINDS
from lora_fx.other_updates import AnyUpdate, WeightUpdate


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over that of what is expected."""
    assert actual.shape == expected.shape
    gap = (actual.double() - expected.double()).norm() / expected.double().norm()
    return float(gap)


def record(update: WeightUpdate, base: torch.Tensor) -> fx.GraphModule:
    """The function as a graph has it: one call an operator."""
    graph = fx.Graph()
    tracer = GraphAppendingTracer(graph)
    names = ["weight", *(f"value_{place}" for place in range(len(update.values)))]
    result = update.function(*(fx.Proxy(graph.placeholder(name), tracer) for name in names))
    graph.output(result.node)
    graph.lint()
    assert {n.op for n in graph.nodes} == {"placeholder", "call_function", "output"}
    calls = [n for n in graph.nodes if n.op == "call_function"]
    assert all(isinstance(n.target, torch._ops.OpOverload) for n in calls)
    return fx.GraphModule({}, graph)


@pytest.fixture
def means() -> Callable[..., None]:
    """Asserts what an update does to a weight, that a control is far, and that a graph agrees."""

    def check(
        update: AnyUpdate,
        base: torch.Tensor,
        expected: torch.Tensor,
        *controls: torch.Tensor,
        within: float = 1e-6,
    ) -> None:
        actual = update.weight(base)
        assert distance(actual, expected) <= within
        assert all(distance(actual, control) > 1e-2 for control in (base, *controls))
        if isinstance(update, WeightUpdate):
            values = [v.to(actual.dtype) if v.is_floating_point() else v for v in update.values]
            again = record(update, base)(base.to(actual.dtype), *values)
            assert torch.equal(again, actual)

    return check


@dataclass(frozen=True)
class Foreign:
    """A layer that another program wrapped."""

    layer: nn.Module
    base: torch.Tensor
    merged: torch.Tensor
    tensors: dict[str, torch.Tensor]


def randomize(parameters: Any) -> None:
    make = torch.Generator().manual_seed(3)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=make, dtype=parameter.dtype)
        parameter.data.copy_(noise)


@pytest.fixture
def by_peft() -> Callable[..., Foreign]:
    """Wraps one layer by PEFT: the tensors that it saves, and the weight that it merges."""

    def wrap(layer: nn.Module, config: Any) -> Foreign:
        import peft

        model = nn.Sequential()
        model.add_module("layer", layer.double())
        before = layer.weight.detach().clone()
        wrapped = peft.get_peft_model(model, config).double().eval()
        randomize(p for name, p in wrapped.named_parameters() if "base_layer" not in name)
        start = "base_model.model.layer."
        tensors = {
            name.removeprefix(start).removeprefix("base_model."): tensor.clone()
            for name, tensor in peft.get_peft_model_state_dict(wrapped).items()
        }
        merged = copy.deepcopy(wrapped).merge_and_unload().layer.weight.detach()
        return Foreign(wrapped.base_model.model.layer, before, merged, tensors)

    return wrap


@pytest.fixture
def by_lycoris() -> Callable[..., Foreign]:
    """Wraps one layer by LyCORIS; what it merges to is read off its forward, see below.

    ``get_merged_weight`` of LyCORIS 4.1.3 scales twice. What it trains, and what a user sees, is
    its forward: its output on one-hot inputs, as large as the kernel, is the weight itself.
    """

    def wrap(
        module: str, layer: nn.Module, *, dtype: torch.dtype = torch.float64, **options: Any
    ) -> Foreign:
        import lycoris.modules as modules

        layer = layer.to(dtype)
        wrapped = getattr(modules, module)("layer", layer, **options).to(dtype).eval()
        randomize(wrapped.parameters())
        tensors = {name: t.detach().clone() for name, t in wrapped.state_dict().items()}
        return Foreign(wrapped, layer.weight.detach(), forward_weight(wrapped, layer), tensors)

    return wrap


def forward_weight(wrapped: nn.Module, layer: nn.Module) -> torch.Tensor:
    """The weight that a forward applies, found by its answers to one-hot inputs."""
    shape = layer.weight.shape
    ones = torch.eye(shape[1:].numel(), dtype=layer.weight.dtype).reshape(-1, *shape[1:])
    answers = wrapped(ones).detach().reshape(len(ones), -1)
    if layer.bias is not None:
        answers = answers - layer.bias.detach()
    return answers.T.reshape(shape)


@pytest.fixture
def read() -> Callable[..., AnyUpdate]:
    """Reads a layer's tensors by the name of their kind, and checks that they are kept."""

    def reading(kind: str, tensors: dict[str, torch.Tensor], **settings: Any) -> AnyUpdate:
        assert tensors.keys() <= KINDS[kind].leaves
        update = KINDS[kind].read(tensors, settings)
        assert update.kind == kind
        assert update.stored is not None
        assert update.stored.settings == settings
        assert update.stored.tensors.keys() == tensors.keys()
        assert all(update.stored.tensors[leaf] is tensors[leaf] for leaf in tensors)
        return update

    return reading


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def noise() -> Callable[..., torch.Tensor]:
    """Numbers of a shape, other ones at every call."""
    make = torch.Generator().manual_seed(11)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=make).to(dtype)

    return draw
