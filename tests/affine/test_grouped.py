"""Grouped convolutions: rows of a kernel belong to groups, so nothing may mix them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lora_fx import text, trace
from lora_fx.passes import FoldLora
from lora_fx.testing import Computes


def grouped(function: Callable[..., Any]) -> nn.Module:
    torch.manual_seed(0)
    one, two = (nn.Conv1d(6, 4, 3, groups=2) for _ in range(2))
    mix, order = nn.Conv1d(4, 4, 1), nn.Buffer(torch.tensor([2, 3, 0, 1]))
    return Computes(function, {"gain": (4, 1)}, one=one, two=two, mix=mix, order=order)


FOLDED: dict[str, Callable[..., Any]] = {
    "a sum": lambda m, x: m.one(x) + m.two(x),
    "scaled by channels": lambda m, x: m.one(x) * m.gain,
}
MIXED: dict[str, Callable[..., Any]] = {
    "a pointwise one behind": lambda m, x: m.mix(m.one(x)) + m.two(x),
    "a linear behind": lambda m, x: m.mix.weight[:, :, 0] @ m.one(x) + m.two(x),
    "channels picked": lambda m, x: m.one(x).index_select(1, m.order) + m.two(x),
    "channels turned": lambda m, x: torch.cat((m.one(x)[:, 2:], m.one(x)[:, :2]), 1) + m.two(x),
    "channels padded": lambda m, x: nn.functional.pad(m.one(x)[:, 2:], (0, 0, 0, 2)) + m.two(x),
    "channels split": lambda m, x: (
        (lambda p: torch.cat((p[1], p[0]), 1))(m.one(x).chunk(2, 1)) + m.two(x)
    ),
    "halves swapped by axes": lambda m, x: (
        m.one(x).unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2) + m.two(x)
    ),
}


@pytest.mark.parametrize("chains", [False, True])
@pytest.mark.parametrize("name", FOLDED | MIXED)
def test_a_fold_of_grouped_convolutions_changes_nothing(name: str, chains: bool) -> None:
    module = grouped((FOLDED | MIXED)[name]).double().eval()
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1)).double()
    gm = trace(module, (x,))
    folded = FoldLora(chains=chains)(gm).graph_module
    assert (folded(x) - module(x)).norm() <= 1e-9 * module(x).norm()
    assert (text(folded) != text(gm)) or name in MIXED
