"""Models that keep what they computed for the sizes of their last call, as detection heads do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import compare

X = torch.randn(3, 3, 8, 6, generator=torch.Generator().manual_seed(0))


class Head(nn.Module):
    """Adds a grid that is made anew where the sizes are others than those of the last call."""

    shape: torch.Size | None = None

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("calls", torch.zeros(1 << 19))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x)
        if self.shape != y.shape:
            self.grid = torch.arange(y.shape[2])[:, None] * torch.arange(y.shape[3])
            self.shape = y.shape
            self.get_buffer("calls").add_(1)
        return y + self.grid


@pytest.mark.parametrize("axes", [{0: "batch"}, {0: "batch", 2: "height"}])
@torch.no_grad()
def test_sizes_of_the_last_call_are_no_constants(axes: dict[int, str]) -> None:
    model = Head().eval()
    model(X)
    grid, calls = model.grid, model.get_buffer("calls").clone()
    gm = lora_fx.trace(model, (X,), dynamic_shapes=(axes,))
    assert model.grid is grid
    assert torch.equal(model.get_buffer("calls"), calls)
    other = torch.randn(5, 3, 11 if 2 in axes else 8, 6)
    assert torch.equal(gm(other), model(other))
    assert not compare(gm(other), model.conv(other)).ok  # without the grid


def test_a_size_that_is_a_constant_is_refused_as_ever() -> None:
    class Steps(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for row in range(x.shape[0]):
                x = x + row
            return x

    with pytest.raises(lora_fx.TraceError, match="specialized it to be a constant"):
        lora_fx.trace(Steps(), (X,), dynamic_shapes=({0: "batch"},))
