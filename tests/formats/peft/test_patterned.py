"""One rank and one alpha, and patterns for the layers that differ."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_fx import Adapter, AdapterError, Update
from lora_fx.formats import load_adapter, save_adapter
from lora_fx.testing import save_peft_case

# PEFT does not see the keys of parameters.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not")
NAMES = ("linear loha patterns", "linear lokr patterns", "experts patterns", "attention rslora")


def low(rank: int, scale: float = 1.5) -> Update:
    return Update(torch.randn(rank, 6), torch.randn(6, rank), scale)


@pytest.mark.parametrize("other", [low(3), low(2, 1.0)])
def test_an_output_projection_has_the_rank_of_its_attention(other: Update, tmp_path: Path) -> None:
    adapter = Adapter("a", {"mha": low(2), "mha.out_proj": other})
    with pytest.raises(AdapterError, match=r"these differ: mha\.out_proj"):
        save_adapter(adapter, tmp_path / "a")
    save_adapter(Adapter("a", {"mha": low(2), "mha.out_proj": low(2)}), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["target_modules"]) == ({}, "mha")


@pytest.mark.parametrize("name", NAMES)
def test_patterns_give_every_layer_its_rank_and_alpha(name: str, tmp_path: Path) -> None:
    case = save_peft_case(name, tmp_path / "by_peft")
    adapter = load_adapter(case.directory, base=case.base, name="a")
    save_adapter(replace(adapter, expects=None), tmp_path / "written")
    assert str(load_adapter(tmp_path / "written", base=case.base, name="a")) == str(adapter)
