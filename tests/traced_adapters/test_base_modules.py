"""The layers that are adapted, alone, around the base's own tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_fx import fold, inject, load_adapter, trace
from lora_fx.graph.example import forget_model
from lora_fx.layers.base_layers import layers_of
from lora_fx.testing import SavedCase, relative, save_peft_case
from lora_fx.traced_adapters.base_modules import adapted
from lora_fx.traced_adapters.config import parse


def config(**fields: Any) -> Any:
    return parse({"peft_type": "HIRA", "target_modules": ["wide"], **fields}, "here", True)


def test_the_layers_share_the_tensors_of_the_base_and_nothing_else(hira: SavedCase) -> None:
    base: Any = hira.base
    found: Any = adapted(config(), layers_of(base))
    assert list(found) == ["wide"]
    assert found["wide"] is not base.wide
    assert found["wide"].weight is not base.wide.weight
    assert found["wide"].weight.data_ptr() == base.wide.weight.data_ptr()
    found["wide"].weight.data = torch.zeros(1)
    found["wide"].register_forward_hook(print)
    assert base.wide.weight.shape == (5, 3)
    assert not base.wide._forward_hooks


def test_the_rule_of_the_config_says_which(hira: SavedCase) -> None:
    base = layers_of(hira.base)
    assert list(adapted(config(target_modules="all-linear"), base)) == ["wide", "narrow"]
    rest = config(target_modules="all-linear", exclude_modules=["wide"])
    assert list(adapted(rest, base)) == ["narrow"]


def test_a_module_of_two_names_is_adapted_once() -> None:
    model = nn.Module()
    model.one = model.two = nn.Linear(3, 5)
    assert list(adapted(config(target_modules="one|two"), layers_of(model))) == ["one"]


@pytest.mark.parametrize("forgets", [False, True])
@pytest.mark.parametrize("name", ["hira, ragged", "hira, Conv1D", "hira, embedding"])
def test_a_graph_is_a_base_too(name: str, forgets: bool, tmp_path: Path) -> None:
    case = save_peft_case(name, tmp_path / "a")
    gm = trace(case.base, (case.x,))
    if forgets:
        forget_model(gm)
    with torch.no_grad():
        found = fold(inject(gm, load_adapter(case.directory, base=gm)))(case.x)
        assert relative(found, case.run(case.directory)) <= 1e-5
        assert relative(case.base(case.x), found) > 1e-2
