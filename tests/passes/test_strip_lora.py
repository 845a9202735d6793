from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_fx import Adapter, Update, inject, text, trace
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
