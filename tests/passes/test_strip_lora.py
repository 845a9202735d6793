from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lora_fx import Adapter, Update, adapter_from, inject, text, trace
from lora_fx.passes import StripLora
from lora_fx.testing import check_pass, make_adapter

SHAPES = {"wide": (5, 3), "again": (5, 5)}


def test_stripping_gives_the_base(ragged: Any, x: Any) -> None:
    base = trace(ragged, (x,))
    injected = inject(
        base, [make_adapter(SHAPES), make_adapter({"wide": (5, 3)}, 3, name="german")]
    )
    seen = check_pass(StripLora(), injected, x, expected=ragged(x), control=injected(x))
    assert seen.after == text(base)
    assert not check_pass(StripLora(), seen.gm, x).result.modified


def test_one_adapter_can_be_stripped_by_name(ragged: Any, x: Any) -> None:
    base = trace(ragged, (x,))
    french, german = make_adapter(SHAPES), make_adapter({"wide": (5, 3)}, 3, name="german")
    for pair in ([french, german], [german, french]):
        left = StripLora("german")(inject(base, pair)).graph_module
        assert text(left) == text(inject(base, french))


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_what_scales_inputs_is_taken_away_before_the_layer(
    frontend: str, ragged: Any, x: Any
) -> None:
    base = trace(ragged, (x,), frontend=frontend)
    updates = {"wide": Update(torch.zeros(0, 3), torch.zeros(5, 0), 1.0, col=torch.rand(3) + 0.5)}
    injected = inject(base, Adapter("french", updates))
    seen = check_pass(StripLora(), injected, x, expected=ragged(x), control=injected(x))
    assert seen.after == text(base)


class Scaled(nn.Module):
    """What a layer reads is multiplied by a number."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.again = nn.Linear(3, 5), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.again(torch.tanh(self.wide(x)) * 2.5) * 0.5
        return y


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_a_number_that_the_model_multiplies_with_is_no_scale(frontend: str, x: Any) -> None:
    model = Scaled().eval()
    base = trace(model, (x,), frontend=frontend)
    injected = inject(base, make_adapter(SHAPES))
    assert adapter_from(injected).updates.keys() == SHAPES.keys()
    seen = check_pass(StripLora(), injected, x, expected=model(x), control=injected(x))
    assert seen.after == text(base)
