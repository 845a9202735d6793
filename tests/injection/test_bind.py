from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lora_fx import Adapter, AdapterError, LoraConfig, Update, trace
from lora_fx.adapters.target_rule import TargetRule
from lora_fx.injection.bind import check_fit, fresh_targets
from lora_fx.layers.sites import by_path
from lora_fx.testing import make_adapter


def test_what_does_not_match_is_returned_with_its_reason(ragged: Any) -> None:
    gm = trace(ragged)
    updates = make_adapter({"wide": (5, 3), "head": (5, 3)}).updates
    adapter = Adapter("a", updates, {"gone.bias": torch.ones(5)}, TargetRule(["wide", "again"]))
    assert set(check_fit(gm, adapter, by_path(gm), strict=False)) == {"head", "gone.bias", "again"}
    with pytest.raises(
        AdapterError, match=r"2 targets match nothing in the graph: head, gone.bias"
    ):
        check_fit(gm, adapter, by_path(gm), strict=True)


def test_an_adapter_that_fits_leaves_nothing_over(ragged: Any) -> None:
    gm = trace(ragged)
    adapter = make_adapter({"wide": (5, 3), "again": (5, 5)})
    assert check_fit(gm, adapter, by_path(gm), strict=True) == {}


@pytest.mark.parametrize("name", ["train", "half", "weight", "is"])
def test_a_name_that_torch_or_python_has_taken_fits(name: str, ragged: Any) -> None:
    gm = trace(ragged)
    update = Update(torch.ones(2, 3), torch.ones(5, 2), 1.0)
    assert check_fit(gm, Adapter(name, {"wide": update}), by_path(gm), strict=True) == {}


def test_a_config_chooses_layers_by_its_rule(ragged: Any) -> None:
    gm = trace(ragged)
    config = LoraConfig(r=2, exclude_modules=["narrow"])
    assert fresh_targets(gm, config, by_path(gm)) == ["wide", "again"]


def test_all_linear_means_modules_and_not_bare_weights(shared: Any) -> None:
    gm = trace(shared)
    groups = by_path(gm)
    assert set(groups) == {"one", "two", "weight", "one.weight"}
    assert set(fresh_targets(gm, LoraConfig(r=2), groups)) == {"one", "two"}
    chosen = fresh_targets(gm, LoraConfig(r=2, target_modules=["weight"]), groups)
    assert set(chosen) == {"weight", "one.weight"}


def test_a_name_that_a_parameter_has_is_refused() -> None:
    class Holds(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 3)
            self.lora_A = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lora_A(super().forward(x))

    gm = trace(nn.Sequential(Holds()))
    adapter = Adapter("weight", {"0": Update(torch.ones(2, 3), torch.ones(3, 2), 1.0)})
    with pytest.raises(AdapterError, match=r"0\.lora_A\.weight, names that the model"):
        check_fit(gm, adapter, by_path(gm), strict=True)
