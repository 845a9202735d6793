"""The adapted layers alone, around the base's own tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import AdapterError, fold, inject, load_adapter, trace
from lora_fx.graph.example import forget_model
from lora_fx.layers.base_layers import layers_of
from lora_fx.testing import SavedCase, relative, save_peft_case
from lora_fx.traced_adapters.config import parse
from lora_fx.traced_adapters.skeleton import adapted

Changed = Callable[..., Path]


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


def test_a_tensor_without_a_use_is_refused_by_name(hira: SavedCase, changed: Changed) -> None:
    key = "base_model.model.wide.hira_C"
    directory = changed(hira, lambda tensors: {**tensors, key: torch.ones(2)})
    with pytest.raises(AdapterError, match=r"1 tensors that the config gives no use: .*hira_C"):
        load_adapter(directory, base=hira.base)


def test_a_tensor_that_is_missing_is_refused_by_name(hira: SavedCase, changed: Changed) -> None:
    directory = changed(hira, lambda t: {k: v for k, v in t.items() if "wide.hira_A" not in k})
    with pytest.raises(AdapterError, match=r"1 tensors are missing: .*wide\.hira_A"):
        load_adapter(directory, base=hira.base)


def test_a_tensor_of_another_shape_is_refused_by_name(hira: SavedCase, changed: Changed) -> None:
    directory = changed(hira, lambda t: {k: torch.ones(1, 1) for k in t})
    with pytest.raises(AdapterError, match=r"(?s)PEFT cannot load the tensors: .*hira_A"):
        load_adapter(directory, base=hira.base)


def test_a_module_stored_whole_and_a_bias_stand_beside(boft: SavedCase, changed: Changed) -> None:
    whole = {"base_model.model.narrow.weight": torch.ones(4, 12)}
    directory = changed(
        boft,
        lambda t: {k: v for k, v in t.items() if "narrow" not in k} | whole,
        target_modules=["wide"],
        modules_to_save=["narrow"],
    )
    adapter = load_adapter(directory, base=boft.base)
    assert list(adapter.updates) == ["wide"]
    assert list(adapter.replacements) == ["narrow.weight"]


def test_one_file_with_its_config_beside_it_is_read_too(hira: SavedCase) -> None:
    found = load_adapter(hira.directory / "adapter_model.safetensors", base=hira.base)
    assert isinstance(found, lora_fx.Adapter)
    assert list(found.updates) == ["wide", "narrow"]
