"""The table of operators, and random graphs of all of them.

``LORA_FX_GRAPHS=2000 pytest tests/affine/transfer/test_transfer.py`` draws more of them.
"""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import fx, nn

from lora_fx import fold, text, trace, unfold
from lora_fx.affine.transfer import TRANSFER
from lora_fx.graph.ops import op_name
from lora_fx.passes import FoldLora
from lora_fx.testing import analyse_function

GRAPHS = max(500, int(os.environ.get("LORA_FX_GRAPHS", "0")))
TABLES = (
    *("linear", "convolution", "einsum", "elementwise", "views", "slicing", "concat"),
    *("reductions", "spectra"),
)

Function = Callable[..., torch.Tensor]


def gate(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a * torch.sigmoid(b)


def drawn(m: Any, layer: Any) -> dict[str, Function]:
    """What a step may do with two earlier activations (2, 3, 4)."""
    return {
        "layer": lambda a, b: layer(a),
        "branch": lambda a, b: layer(a) + a @ m.down @ m.up,
        "low": lambda a, b: (a @ m.down) @ m.up,
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "alpha": lambda a, b: torch.add(a, b, alpha=-0.5),
        "scale": lambda a, b: 0.5 * a,
        "vector": lambda a, b: a * m.vector,
        "shift": lambda a, b: m.vector - a,
        "one": lambda a, b: a / (2 + m.one * m.one),
        "square": lambda a, b: F.linear(a, m.square + m.up.T @ m.down.T),
        "left": lambda a, b: (m.square @ a.transpose(-1, -2)).transpose(-1, -2),
        "drop": lambda a, b: F.dropout(a, 0.5, False),
        "turn": lambda a, b: torch.cat((a[..., 1:], b[..., :1]), -1),
        "swap": lambda a, b: (lambda p: torch.cat((p[1], p[0]), -1))(torch.chunk(a, 2, -1)),
        "pieces": lambda a, b: (lambda p: torch.cat((p[0], p[1]), -1))(a.split([1, 3], -1)),
        "pad": lambda a, b: F.pad(a[..., 1:3], (0, 2)) + b,
        "pick": lambda a, b: a.index_select(-1, m.order),
        "flat": lambda a, b: layer(a.reshape(6, 4)).reshape(2, 3, 4),
        "conv": lambda a, b: F.conv1d(a.transpose(-1, -2), m.pairs, m.vector, groups=2).mT,
        "conv back": lambda a, b: F.conv1d(a.mT, m.square.unsqueeze(-1)).transpose(-1, -2),
        "heads": lambda a, b: (a.reshape(2, 3, 2, 2) * m.square[:2, :2]).reshape(2, 3, 4),
        "blocks": lambda a, b: torch.einsum(
            "bsgi,goi->bsgo", a.reshape(2, 3, 2, 2), m.blocks
        ).flatten(-2),
        "embed": lambda a, b: F.embedding(m.ids, m.table),
        "embed branch": lambda a, b: F.embedding(m.ids, m.table) + F.embedding(m.ids, m.low) @ m.up,
        "narrow": lambda a, b: a.float().double(),
        "tanh": lambda a, b: torch.tanh(a),
        "gate": lambda a, b: gate(a, b),
        "softmax": lambda a, b: torch.softmax(a, -1),
        "mean": lambda a, b: a + b.mean(-1, keepdim=True),
        "along the batch": lambda a, b: a * m.column,
        "batch turned": lambda a, b: a.reshape(3, 2, 4).transpose(0, 1) + b,
        "live": lambda a, b: layer(a).cumsum(-1) + b,
        "flip": lambda a, b: a.flip(-1),
        "roll": lambda a, b: torch.roll(a, 1, -1) - b,
        "stack": lambda a, b: torch.stack((a[..., :2], b[..., 2:]), -1).flatten(-2),
        "unbind": lambda a, b: torch.stack(a.unbind(-1)[::-1], -1),
    }


def written(m: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What loralib does: an assignment into zeros, seen through a view."""
    y = a.new_zeros(2, 3, 4)
    y.view(-1, 4)[:, m.mask] = a.reshape(-1, 4)[:, 1:3]
    y[..., 3:] = b[..., :1]
    return y


class Random(nn.Module):
    """A graph drawn step by step: each step reads earlier activations and may be anything."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        make = torch.Generator().manual_seed(len(steps))
        self.steps = steps
        torch.manual_seed(len(steps))
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=i % 2 == 0) for i in range(3))
        shapes = {"down": (4, 2), "up": (2, 4), "square": (4, 4), "vector": (4,), "one": (1,)}
        shapes |= {"pairs": (4, 2, 1), "blocks": (2, 2, 2), "table": (5, 4), "low": (5, 2)}
        shapes |= {"column": (3, 1)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(*shape, generator=make) / 2))
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))
        self.register_buffer("mask", torch.tensor([True, False, True, False]))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.ids, seen = ids, [x]
        for kind, left, right in self.steps:
            a, b = seen[-1 - left % len(seen)], seen[-1 - right % len(seen)]
            if kind == "written":
                seen.append(written(self, a, b))
            else:
                seen.append(drawn(self, self.layers[right % 3])[kind](a, b))
        return seen[-1] + seen[len(seen) // 2], seen[len(seen) // 3]


# Found by earlier runs, and drawn every time since.
NESTED = [("layer", 0, 1), ("layer", 0, 1), ("flat", 0, 1), ("branch", 0, 0), ("layer", 2, 1)]
NESTED += [("layer", 0, 1), ("layer", 0, 1), ("swap", 3, 0), ("layer", 0, 1)]
TIED = [("embed", 0, 0), ("scale", 0, 0), ("layer", 0, 0), ("layer", 0, 0), ("embed", 0, 0)]
TIED_IMAGES = [("low", 0, 0), ("point", 0, 0), ("conv", 1, 0), ("sub", 0, 1), ("conv", 0, 0)]
KINDS = tuple(drawn(None, None))
IDS = torch.tensor([[0, 4, 2], [1, 1, 3]])


def steps_of(kinds: tuple[str, ...]) -> Any:
    step = st.tuples(st.sampled_from(kinds), st.integers(0, 3), st.integers(0, 3))
    return st.lists(step, min_size=1, max_size=12)


def check(steps: list[tuple[str, int, int]], frozen: bool, frontend: str) -> None:
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2)).double()
    module = Random(steps).eval().double().requires_grad_(not frozen)
    gm = trace(module, (x, IDS), frontend=frontend, check=False)  # held against the module below
    folded = fold(gm)
    rounds = any(kind == "narrow" for kind, _, _ in steps)
    with torch.no_grad():
        for got, wanted in zip(folded(x, IDS), module(x, IDS), strict=True):
            assert got.dtype == wanted.dtype
            # Against the size of the terms: their sum may cancel to nothing.
            assert (got - wanted).norm() <= (1e-5 if rounds else 1e-9) * (1 + wanted.norm())
    assert not FoldLora()(folded).modified
    assert text(unfold(folded)) == text(gm)


@settings(max_examples=GRAPHS, deadline=None)
@given(steps_of(KINDS), st.booleans())
@example(NESTED, False)
@example(TIED, True)
def test_a_fold_of_random_graphs_changes_no_result_and_is_done_once(
    steps: list[tuple[str, int, int]], frozen: bool
) -> None:
    check(steps, frozen, "symbolic")


@settings(max_examples=40, deadline=None)
@given(steps_of((*KINDS, "written", "written")), st.booleans())
def test_a_fold_of_40_exported_graphs_changes_no_result_and_is_done_once(
    steps: list[tuple[str, int, int]], frozen: bool
) -> None:
    check(steps, frozen, "export")


class Images(nn.Module):
    """Random sums and chains of convolutions of one geometry."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        torch.manual_seed(len(steps))
        self.steps = steps
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.strided = nn.Conv2d(3, 3, (3, 1), padding=(1, 0), bias=False)
        self.points = nn.ModuleList(nn.Conv2d(3, 3, 1, bias=i > 0) for i in range(2))
        self.gain = nn.Parameter(torch.randn(3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = [x]
        for kind, left, right in self.steps:
            a, b = seen[-1 - left % len(seen)], seen[-1 - right % len(seen)]
            choices: dict[str, Function] = {
                "conv": lambda a, b, n=right % 2: self.convs[n](a),
                "point": lambda a, b, n=right % 2: self.points[n](a),
                "strided": lambda a, b: self.strided(a),
                "low": lambda a, b: F.conv2d(self.convs[0](a), self.points[0].weight * 0.5),
                "add": lambda a, b: a + b,
                "sub": lambda a, b: a - 2 * b,
                "gain": lambda a, b: a * self.gain,
                "relu": lambda a, b: torch.relu(a),
            }
            seen.append(choices[kind](a, b))
        return seen[-1] + seen[len(seen) // 2]


IMAGES = ("conv", "point", "strided", "low", "add", "sub", "gain", "relu")


@settings(max_examples=GRAPHS // 4, deadline=None)
@given(steps_of(IMAGES))
@example(TIED_IMAGES)
def test_a_fold_of_sums_of_convolutions_changes_no_result_and_is_done_once(
    steps: list[tuple[str, int, int]],
) -> None:
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(2)).double()
    module = Images(steps).eval().double()
    gm = trace(module, (x,), frontend="symbolic", check=False)  # held against the module below
    folded = fold(gm)
    with torch.no_grad():
        got, wanted = folded(x), module(x)
    assert (got - wanted).norm() <= 1e-9 * (1 + wanted.norm())
    assert not FoldLora()(folded).modified
    assert text(unfold(folded)) == text(gm)


def test_every_function_of_the_table_is_in_some_case() -> None:
    cases: dict[tuple[str, str], list[Any]] = {}
    for table in TABLES:
        rows = runpy.run_path(str(Path(__file__).with_name(f"test_{table}.py")))
        tracer = "export" if table == "elementwise" else "symbolic"  # which alone gives an rsub
        for function, name, *only in (rows["CASES"] | rows.get("CASTS", {})).values():
            cases.setdefault((name, *(only[:1] or [tracer])), []).append(function)
    seen: set[str] = set()
    for where, functions in cases.items():  # one graph of all that take one input
        every = partial(lambda fs, m, x: [function(m, x) for function in fs], functions)
        analysis, _ = analyse_function(every, *where, check=False)
        seen |= {op_name(node) for node in analysis.gm.graph.nodes}
    rules = {TRANSFER[name].__name__ for name in seen & set(TRANSFER)}
    assert rules == {rule.__name__ for rule in TRANSFER.values()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_step_is_traced(kind: str) -> None:
    gm = trace(Random([(kind, 0, 0)]).eval(), frontend="symbolic")
    assert isinstance(gm, fx.GraphModule)
