from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lora_fx import Adapter, Update, fold, inject, trace
from lora_fx.graph.aliasing import Memory, written
from lora_fx.injection.branches import branches
from lora_fx.testing import relative


class Sized(nn.Module):
    """Writes into what it later asks for its sizes, and gives a weight these."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 5))
        self.v = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.v
        y[x > 0] = 0.25
        return torch.bmm(y.sin(), self.w.expand(y.shape[0], -1, -1)).tanh()


def test_a_size_shares_no_memory_with_what_is_asked_for_it() -> None:
    torch.manual_seed(0)
    model, x = Sized().eval().requires_grad_(False), torch.randn(2, 4, 3)
    gm = trace(model, (x,), frontend="symbolic")
    both = Adapter(
        "french",
        {
            "w": Update(torch.randn(2, 3), torch.randn(5, 2), 1.5),
            "v": Update(torch.randn(2, 3), torch.randn(3, 2), 1.5),
        },
    )
    injected = inject(gm, both)
    folded = fold(injected)
    assert branches(folded) == []
    assert relative(folded(x), injected(x)) <= 1e-5
    assert relative(gm(x), injected(x)) > 1e-2


@pytest.mark.parametrize(("name", "shares"), [("shape", False), ("mT", True), ("data", True)])
def test_what_an_attribute_shares(name: str, shares: bool) -> None:
    class Asks(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return getattr(x, name)[0]

    graph = torch.fx.symbolic_trace(Asks()).graph
    x, asked, *_ = graph.nodes
    assert (asked in Memory(graph).group(x)) is shares


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)
        self.other = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        view = y.as_strided((4, 5), (5, 1))
        view.add_(1)
        return torch.relu(self.other(x)) + y.reshape(-1, 5)


def test_all_that_shares_memory_with_what_is_written_is_named() -> None:
    gm = trace(Writes())
    names = {node.name for node in written(gm.graph)}
    assert {"linear", "as_strided", "add_", "reshape"} <= names
    assert "linear_1" not in names
    assert "x" not in names


def test_a_graph_that_writes_nothing() -> None:
    assert written(trace(nn.Linear(3, 5)).graph) == set()


def test_a_table_that_is_renormalised_is_written_to() -> None:
    gm = trace(nn.Embedding(7, 3, max_norm=1.0))
    assert {"weight", "embedding"} <= {node.name for node in written(gm.graph)}


class Mapped(nn.Module):
    """As T5Gemma 2: some of its code runs row by row, and it writes elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.vmap(torch.vmap(lambda row: self.fc(row).sin()))(x)
        y[:, 0] = 0.25
        return y.tanh()


@torch.no_grad()
def test_rows_of_a_vmap_share_the_memory_of_all() -> None:
    model, x = Mapped().eval(), torch.randn(4, 7, 3)
    gm = trace(model, (x[:2],), dynamic_shapes=({0: "batch"},))
    update = Update(torch.randn(2, 3), torch.randn(5, 2), 1.5)
    tuned = inject(gm, Adapter("french", {"fc": update}))
    merged = copy.deepcopy(model)
    merged.fc.weight += update.delta()
    assert relative(tuned(x), merged(x)) < 1e-6
    assert relative(fold(tuned)(x), merged(x)) < 1e-6
    assert relative(model(x), merged(x)) > 1e-2
