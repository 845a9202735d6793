from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lora_fx import trace
from lora_fx.affine.regions import maximal_regions
from lora_fx.affine.transfer import analyse


class Layers(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.down, self.up = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 4))
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def regions_of(function: Callable[..., Any]) -> list[tuple[str, str, int, bool]]:
    gm = trace(Layers(function))
    found = maximal_regions(gm, analyse(gm))
    return [(r.value.node.name, r.layer.name, len(r.nodes), bool(r.blocked)) for r in found]


CASES: dict[str, tuple[Callable[..., Any], list[tuple[str, str, int, bool]]]] = {
    "a lone layer": (lambda m, x: m.one(x), []),
    "a chain without a parallel path": (lambda m, x: m.two(m.one(x)), []),
    "a low-rank bottleneck": (lambda m, x: x @ m.down @ m.up, []),
    "a layer and a branch": (
        lambda m, x: m.one(x) + x @ m.down @ m.up,
        [("add", "linear", 4, False)],
    ),
    "a scaled layer": (lambda m, x: m.one(x) * 2, [("mul", "linear", 2, False)]),
    "two regions in a row": (
        lambda m, x: (lambda h: m.two(h) + h @ m.down @ m.up)(m.one(x) * 2),
        [("add", "linear_1", 4, False), ("mul", "linear", 2, False)],
    ),
    "a region inside a larger one": (
        lambda m, x: (m.one(x) + x @ m.down @ m.up) * 2 + m.two(x),
        [("add_1", "linear", 7, False)],
    ),
    "the layer is read outside": (
        lambda m, x: (lambda y: (y + x @ m.down @ m.up, torch.relu(y)))(m.one(x)),
        [("add", "linear", 4, True)],
    ),
    "another layer is free": (
        lambda m, x: (lambda y: (y + m.two(x), torch.relu(y)))(m.one(x)),
        [("add", "linear_1", 3, False)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_regions_are_maximal_and_hold_a_layer(name: str) -> None:
    function, expected = CASES[name]
    assert regions_of(function) == expected
