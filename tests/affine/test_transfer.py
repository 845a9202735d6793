"""Each transfer function alone, then random graphs of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_fx import compare, fold, text, trace
from lora_fx.affine.maps import Map, Opaque, Same
from lora_fx.affine.transfer import analyse

MAKE = torch.Generator().manual_seed(0)
W, V = torch.randn(5, 3, generator=MAKE), torch.randn(7, 5, generator=MAKE)
ROW = torch.randn(5, generator=MAKE)


class Spelled(nn.Module):
    """A function of x and of constants, as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.w, self.v, self.row = (nn.Parameter(t.clone()) for t in (W, V, ROW))
        self.one = nn.Parameter(torch.tensor([2.5]))
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def value_of(function: Callable[..., Any]) -> tuple[Any, Spelled]:
    module = Spelled(function).eval()
    gm = trace(module)
    result = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    return analyse(gm).values[result], module


AFFINE: dict[str, Callable[..., Any]] = {
    "linear": lambda m, x: nn.functional.linear(x, m.w, m.row),
    "addmm": lambda m, x: torch.addmm(m.row, x, m.w.T),
    "matmul": lambda m, x: x @ m.w.T,
    "mm": lambda m, x: torch.mm(x, m.w.T),
    "add": lambda m, x: x @ m.w.T + nn.functional.linear(x, 2 * m.w),
    "add number": lambda m, x: 2 + x @ m.w.T,
    "add vector": lambda m, x: x @ m.w.T + m.row,
    "sub": lambda m, x: x @ m.w.T - x @ (m.w.T * m.row),
    "sub from a vector": lambda m, x: m.row - x @ m.w.T,
    "sub a number": lambda m, x: x @ m.w.T - 3,
    "mul number": lambda m, x: 3 * (x @ m.w.T + m.row),
    "mul vector": lambda m, x: (x @ m.w.T + m.row) * m.row,
    "mul one element": lambda m, x: (x @ m.w.T + m.row) * m.one,
    "div": lambda m, x: (x @ m.w.T + m.row) / m.row,
    "neg": lambda m, x: -(x @ m.w.T + m.row),
    "residual": lambda m, x: x + x @ (m.w.T @ m.w),
    "dropout in eval": lambda m, x: nn.functional.dropout(x @ m.w.T, 0.5, m.training),
    "clone": lambda m, x: (x @ m.w.T).clone().contiguous().detach(),
    "chain": lambda m, x: (x @ m.w.T) @ m.v.T + nn.functional.linear(x, m.v @ m.w),
}


@pytest.mark.parametrize("name", AFFINE)
def test_a_map_computes_what_the_graph_does(name: str) -> None:
    value, module = value_of(AFFINE[name])
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    assert isinstance(value, Map)
    weight, bias = value.since(next(iter_up(value)))
    got = x @ weight.dense(torch.float32).T
    if bias is not None:
        got = got + bias.dense(torch.float32).reshape(-1)
    assert compare(got, module(x)).ok
    assert not compare(1.1 * got, module(x)).ok


def iter_up(value: Map) -> Any:
    """The source of a Map."""
    while value.parent is not None:
        value = value.parent
    yield value


OPAQUE: dict[str, Callable[..., Any]] = {
    "relu": lambda m, x: torch.relu(x @ m.w.T),
    "product of activations": lambda m, x: (x @ m.w.T) * x.sum(-1, keepdim=True),
    "two sources": lambda m, x: x @ m.w.T + torch.sin(x) @ m.w.T,
    "dropout in training": lambda m, x: nn.functional.dropout(x @ m.w.T, 0.5, True),
    "scaled along the batch": lambda m, x: (x @ m.w.T) * m.row.reshape(5, 1),
    "added along the batch": lambda m, x: (x @ m.w.T) + m.row.reshape(5, 1),
    "weight on the left": lambda m, x: m.w.T @ (x @ m.w.T),
    "division by an activation": lambda m, x: m.row / (x @ m.w.T),
    "weight from data": lambda m, x: x @ (m.w * x.sum()).T,
    "rounded": lambda m, x: torch.div(x @ m.w.T, 2, rounding_mode="floor"),
    "add with alpha": lambda m, x: torch.add(x @ m.w.T, x @ m.w.T, alpha=2),
    "written": lambda m, x: (x @ m.w.T).add_(1),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_what_is_not_affine_in_the_last_axis_is_opaque_with_a_reason(name: str) -> None:
    value, _ = value_of(OPAQUE[name])
    assert isinstance(value, Opaque)
    assert value.reason


def test_an_operator_that_passes_its_input_on_is_no_source_of_its_own() -> None:
    value, _ = value_of(lambda m, x: nn.functional.dropout(x, 0.5, m.training))
    assert isinstance(value, Same)


class Random(nn.Module):
    """A graph drawn step by step: each step reads earlier activations and may be anything."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        make = torch.Generator().manual_seed(len(steps))
        self.steps = steps
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=i % 2 == 0) for i in range(3))
        self.constants = nn.ParameterList(
            nn.Parameter(torch.randn(*shape, generator=make) / 2)
            for shape in ((4, 2), (2, 4), (4, 4), (4,), (1,))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down, up, square, vector, one = self.constants
        seen = [x]
        for kind, left, right in self.steps:
            a, b = seen[-1 - left % len(seen)], seen[-1 - right % len(seen)]
            layer = self.layers[right % 3]
            choices = {
                "layer": lambda a, b, layer: layer(a),
                "branch": lambda a, b, layer: layer(a) + a @ down @ up,
                "low": lambda a, b, layer: (a @ down) @ up,
                "add": lambda a, b, layer: a + b,
                "sub": lambda a, b, layer: a - b,
                "scale": lambda a, b, layer: 0.5 * a,
                "vector": lambda a, b, layer: a * vector,
                "shift": lambda a, b, layer: vector + a,
                "one": lambda a, b, layer: a / (2 + one * one),
                "square": lambda a, b, layer: nn.functional.linear(a, square + up.T @ down.T),
                "drop": lambda a, b, layer: nn.functional.dropout(a, 0.5, False),
                "tanh": lambda a, b, layer: torch.tanh(a),
                "gate": lambda a, b, layer: a * torch.sigmoid(b),
                "softmax": lambda a, b, layer: torch.softmax(a, -1),
            }
            seen.append(choices[kind](a, b, layer))
        return seen[-1] + seen[len(seen) // 2]


KINDS = (
    *("layer", "branch", "low", "add", "sub", "scale", "vector", "shift", "one", "square"),
    *("drop", "tanh", "gate", "softmax"),
)
STEPS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12
)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_fold_changes_no_result_on_300_random_graphs(steps: list[tuple[str, int, int]]) -> None:
    module, x = Random(steps).eval(), torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    gm = trace(module.double())
    folded = fold(gm)
    got, wanted = folded(x.double()), module(x.double())
    # Against the size of the terms: their sum may cancel to nothing.
    assert (got - wanted).norm() <= 1e-9 * (1 + wanted.norm())
    assert text(fold(folded)) == text(folded)
