from __future__ import annotations

import torch
from torch import nn

from lora_fx import trace
from lora_fx.graph.mutation import written


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
