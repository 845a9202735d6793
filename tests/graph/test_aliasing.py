from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lora_fx import Adapter, Update, fold, inject, trace
from lora_fx.graph.aliasing import Memory
from lora_fx.injection.match_branch import branches
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
