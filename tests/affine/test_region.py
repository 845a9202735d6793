"""What stands for a region reads what the region reads: ids, patches, or features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lora_fx import trace
from lora_fx.passes import FoldLora
from lora_fx.testing import check_pass


class Behind(nn.Module):
    """Two products behind a table, or behind a kernel: the sizes of some weights are the same."""

    def __init__(self, first: nn.Module, sizes: tuple[int, int]) -> None:
        super().__init__()
        self.first, (into, out) = first, sizes
        self.one, self.two = nn.Linear(into, out), nn.Linear(out, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Ids (..., length), or (batch, channels, length)."""
        found = self.first(x)
        return self.two(self.one(found.mT if isinstance(self.first, nn.Conv1d) else found))


IDS = torch.tensor([[0, 3, 1], [2, 2, 3]])
BEHIND: dict[str, tuple[Callable[[], nn.Module], tuple[int, int], torch.Tensor]] = {
    "as many ids as features": (lambda: nn.Embedding(4, 4), (4, 5), IDS),
    "as many ids as the second reads": (lambda: nn.Embedding(4, 3), (3, 4), IDS),
    "patches as large as a result": (lambda: nn.Conv1d(2, 4, 2), (4, 6), torch.randn(3, 2, 7)),
    "patches of what the second reads": (lambda: nn.Conv1d(2, 3, 3), (3, 6), torch.randn(3, 2, 7)),
    "no sizes the same": (lambda: nn.Embedding(4, 7), (7, 6), IDS),
}


@pytest.mark.parametrize("frontend", ["export", "symbolic"])
@pytest.mark.parametrize("sizes", BEHIND)
def test_a_product_never_stands_for_a_table_or_a_kernel(sizes: str, frontend: Any) -> None:
    make, inner, x = BEHIND[sizes]
    model = Behind(make(), inner).eval()
    gm = trace(model, (x,), frontend=frontend)
    check_pass(FoldLora(chains=True), gm, x, expected=model(x), control=model(x.flip(0)))
