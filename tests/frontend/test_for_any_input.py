from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lora_fx import trace
from lora_fx.testing import relative

causal = nn.Transformer.generate_square_subsequent_mask


class Tutorial(nn.Module):
    """The decoder of torch's tutorial, which makes its mask at each call or is given one."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 10, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        made: torch.Tensor = self.encoder(x, causal(x.shape[1]) if mask is None else mask)
        return made


def test_a_transformer_that_makes_its_causal_mask_is_traced_at_free_lengths() -> None:
    model, x = Tutorial().eval(), torch.randn(3, 11, 8)
    gm = trace(model, (x[:2, :7],), dynamic_shapes=({0: "batch", 1: "length"},))
    assert relative(gm(x), model(x)) <= 1e-6
    assert relative(model(x, torch.zeros(11, 11)), model(x)) > 1e-2


def test_a_mask_that_is_given_is_applied_whatever_the_traced_one_was() -> None:
    model, x = Tutorial().eval(), torch.randn(2, 7, 8)
    gm = trace(model, (x, causal(7)))
    other = causal(7).roll(1, 0).nan_to_num(neginf=-1.0)
    assert relative(gm(x, other), model(x, other)) <= 1e-6
    assert relative(gm(x, other), model(x, causal(7))) > 1e-2


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bnd,edf,bne->bnf", x, self.experts, weights)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What stands in for opt_einsum, which asks for all sizes as numbers."""
    calls = []

    def contract_path(equation: str, *operands: torch.Tensor, optimize: str) -> Any:
        calls.append([int(size) for operand in operands for size in operand.shape])
        return [(0, 2), (0, 1)], None

    module: Any = torch.backends.opt_einsum
    found = {"_opt_einsum": SimpleNamespace(contract_path=contract_path), "strategy": "auto"}
    for name, value in (found | {"enabled": True, "is_available": lambda: True}).items():
        monkeypatch.setattr(module.m, name, value, raising=False)
    return calls


def test_an_einsum_of_three_whose_order_is_counted_keeps_its_sizes_free(counted: Any) -> None:
    model, free = Routed().eval(), {0: "batch", 1: "length"}
    x, weights = torch.randn(3, 11, 5), torch.rand(3, 11, 3)
    gm = trace(model, (x[:2, :7], weights[:2, :7]), dynamic_shapes=(free, free))
    before = len(counted)
    assert relative(gm(x, weights), model(x, weights)) <= 1e-6
    assert len(counted) == before + 1, "the graph counts too" if len(counted) > before else "unused"


def test_an_order_that_is_counted_stays_where_no_size_is_free(counted: Any) -> None:
    model, x, weights = Routed().eval(), torch.randn(2, 7, 5), torch.rand(2, 7, 3)
    gm = trace(model, (x, weights))
    assert torch.equal(gm(x, weights), model(x, weights))
    assert torch.backends.opt_einsum.enabled


class Policy(nn.Module):
    """As stable-baselines3 has it: a distribution is made of what the layers give."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.logits = nn.Linear(3, 2), nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        action = torch.distributions.Normal(self.mean(x), torch.ones(2))
        choice = torch.distributions.Categorical(logits=self.logits(x))
        return action.log_prob(x[:, :2]), choice.entropy()


def test_a_distribution_does_not_look_at_its_parameters() -> None:
    model, x = Policy().eval(), torch.randn(7, 3)
    gm = trace(model, (x[:4],), dynamic_shapes=({0: "batch"},))
    found = zip(gm(x), model(x), strict=True)
    assert all(relative(made, expected) <= 1e-6 for made, expected in found)
    assert relative(gm(x)[1], model(-x)[1]) > 1e-3
    with pytest.raises(ValueError, match="parameter scale"):
        torch.distributions.Normal(0.0, -1.0)
