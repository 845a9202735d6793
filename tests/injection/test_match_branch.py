from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_fx import Adapter, AdapterError, LoraConfig, Update, adapter_from, inject, trace
from lora_fx.injection.match_branch import branches, last_of
from lora_fx.layers.sites import by_path
from lora_fx.testing import make_adapter


def test_branches_are_read_back_from_structure(ragged: Any) -> None:
    gm = inject(trace(ragged), make_adapter({"wide": (5, 3), "again": (5, 5)}))
    found = branches(gm)
    assert [(b.path, b.name, b.scale) for b in found] == [
        ("wide", "french", 1.0),
        ("again", "french", 1.0),
        ("again", "french", 1.0),
    ]
    assert found[0].down.target == "wide.lora_A.french"
    assert found[0].up.target == "wide.lora_B.french"
    assert found[0].base is found[0].site


def test_a_chain_of_branches_ends_in_the_last_sum(ragged: Any) -> None:
    names = ["french", "german", "latin"]
    adapters = [make_adapter({"wide": (5, 3)}, name=name) for name in names]
    gm = inject(trace(ragged), adapters)
    assert [b.name for b in branches(gm)] == names
    site = by_path(gm)["wide"][0]
    assert last_of(site) is branches(gm)[-1].out
    assert last_of(by_path(gm)["narrow"][0]) is by_path(gm)["narrow"][0].node


def test_the_users_own_sums_are_no_branches() -> None:
    class Skip(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(5, 5)
            self.a = torch.nn.Parameter(torch.randn(5, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten.add.Tensor(self.fc(x), x @ self.a @ self.a.T)

    assert branches(trace(Skip())) == []


def test_an_adapter_comes_back_as_it_went_in(ragged: Any) -> None:
    update = Update(torch.randn(2, 3), torch.randn(5, 2), 0.5, bias=torch.randn(5))
    back = adapter_from(inject(trace(ragged), Adapter("a", {"wide": update}))).updates["wide"]
    torch.testing.assert_close(back.delta(), update.delta())
    torch.testing.assert_close(back.scale * back.bias, update.scale * update.bias)
    gm = inject(trace(ragged), LoraConfig(r=2, alpha=6, target_modules=["wide"], name="b"))
    assert adapter_from(gm, "b").updates["wide"].scale == 3.0


def test_an_adapter_that_is_not_there_is_refused(ragged: Any) -> None:
    with pytest.raises(AdapterError, match="none"):
        adapter_from(trace(ragged))
    gm = inject(trace(ragged), make_adapter({"wide": (5, 3)}))
    with pytest.raises(AdapterError, match="'german': the graph holds french"):
        adapter_from(gm, "german")
