"""LoRA of several experts in one parameter, expert by expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lora_fx import AdapterError
from lora_fx.formats.peft.wrappers import WrappedTarget, read_experts
from lora_fx.layers.base_layers import layers_of
from lora_fx.testing import relative


def base(shape: tuple[int, ...], is_transposed: bool) -> nn.Module:
    module: Any = nn.Module()
    module.kernel, module.is_transposed = nn.Parameter(torch.randn(shape)), is_transposed
    return nn.ModuleDict({"experts": module})


def factors() -> dict[str, torch.Tensor]:
    """Of four experts 3 -> 5 at rank 2."""
    make = torch.Generator().manual_seed(0)
    return {
        "lora_A.weight": torch.randn(8, 3, generator=make),
        "lora_B.weight": torch.randn(5, 8, generator=make),
    }


@pytest.mark.parametrize("is_transposed", [False, True])
def test_every_expert_has_its_own_product(is_transposed: bool) -> None:
    shape = (4, 3, 5) if is_transposed else (4, 5, 3)
    model = base(shape, is_transposed)
    place = WrappedTarget("experts.kernel", "experts.kernel", "experts", "kernel", shape=shape)
    update = read_experts(place, factors(), 2, 1.5, False, layers_of(model))
    weight = torch.randn(shape)
    found = update.weight(weight)
    down, up = factors()["lora_A.weight"], factors()["lora_B.weight"]
    for expert in range(4):
        delta = 1.5 * up[:, expert::4] @ down[2 * expert : 2 * expert + 2]
        wanted = weight[expert] + (delta.T if is_transposed else delta)
        assert relative(found[expert], wanted) <= 1e-6
        assert relative(weight[expert], wanted) > 1e-2


def test_square_experts_of_a_graph_are_refused() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bi,eio->beo", x, self.kernel)

    gm = torch.fx.symbolic_trace(nn.Sequential(Square()))
    place = WrappedTarget("0.kernel", "0.kernel", "0", "kernel", shape=(4, 3, 3))
    tensors = factors() | {"lora_B.weight": torch.ones(3, 8)}
    with pytest.raises(AdapterError, match=r"3 by 3, and a graph does not say .* the model itself"):
        read_experts(place, tensors, 2, 1.5, False, layers_of(gm))


def test_other_tensors_are_refused() -> None:
    place = WrappedTarget("experts.kernel", "experts.kernel", "experts", "kernel", shape=(4, 5, 3))
    tensors = {"lora_A.weight": torch.ones(8, 3)}
    with pytest.raises(AdapterError, match=r"^has \['lora_A\.weight'\], expected"):
        read_experts(place, tensors, 2, 1.5, False, layers_of(base((4, 5, 3), False)))
