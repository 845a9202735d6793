"""PEFT's model of the adapted layers takes all tensors of a file, or they are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lora_fx
from lora_fx import AdapterError, load_adapter
from lora_fx.testing import SavedCase

Changed = Callable[..., Path]


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
