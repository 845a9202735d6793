"""Adapters with names that Python or torch has taken: they work, and are read back as given."""

from __future__ import annotations

import builtins
import copy
import keyword
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import Adapter, LoraConfig
from lora_fx.adapters.adapter import WeightUpdate
from lora_fx.adapters.other_updates import added
from lora_fx.injection.branches import branches
from lora_fx.layers.adapter_tensors import name_in, part_of
from lora_fx.testing import make_adapter, relative

ODD = ["is", "None", "match", "_", "train", "forward", "training", "__class__", "self", "a" * 300]
EVERY = [*keyword.kwlist, *keyword.softkwlist, *dir(nn.Module()), *dir(builtins), *ODD]


def test_every_name_is_read_back_as_it_was_and_no_two_meet() -> None:
    names = {f"{name}{'_' * more}" for name in EVERY for more in range(4)}
    parts = {name: part_of(name) for name in names}
    assert all(name_in(f"fc.lora_A.{part}") == name for name, part in parts.items())
    assert len(set(parts.values())) == len(names)
    assert not any(keyword.iskeyword(p) or hasattr(nn.Module(), p) for p in parts.values())
    assert [part_of(name) for name in ("french", "weight", "is_1")] == ["french", "weight", "is_1"]


@pytest.mark.parametrize("name", ODD)
def test_a_graph_runs_and_remembers_the_name(name: str, ragged: Any, x: torch.Tensor) -> None:
    gm = lora_fx.trace(ragged, (x,))
    shapes = {"wide": (5, 3), "narrow": (7, 5)}
    expected = lora_fx.inject(gm, make_adapter(shapes))(x)
    adapted = lora_fx.inject(gm, make_adapter(shapes, name=name))
    assert torch.equal(adapted(x), expected)
    assert relative(gm(x), expected) > 1e-2
    assert {branch.name for branch in branches(adapted)} == {name}
    assert relative(lora_fx.fold(adapted)(x), expected) <= 1e-5
    trained = lora_fx.inject(gm, LoraConfig(r=2, name=name))
    assert torch.equal(trained(x), gm(x))
    assert lora_fx.adapter_from(trained).name == name


def test_two_taken_names_stay_apart(ragged: Any, x: torch.Tensor) -> None:
    gm = lora_fx.trace(ragged, (x,))
    both = [
        make_adapter({"wide": (5, 3)}, name=name, rank=r) for name, r in (("is", 2), ("is_", 3))
    ]
    adapted = lora_fx.inject(gm, both)
    assert [branch.name for branch in branches(adapted)] == ["is", "is_"]
    with pytest.raises(lora_fx.AdapterError, match="adapter is: the graph already has an adapter"):
        lora_fx.inject(adapted, both[0])


def test_a_weight_that_is_made_anew_by_an_adapter_named_like_a_keyword(
    ragged: Any, x: torch.Tensor
) -> None:
    delta = torch.full((5, 3), 0.5)
    update = WeightUpdate("full", added(delta), (5, 3))
    gm = lora_fx.trace(ragged, (x,))
    adapted = lora_fx.inject(gm, Adapter("class", {"wide": update}))
    other = copy.deepcopy(ragged)
    other.wide.weight.data += delta
    assert relative(adapted(x), other(x)) <= 1e-6
    assert relative(gm(x), other(x)) > 1e-2


def test_a_directory_named_like_a_keyword_is_exported(
    ragged: Any, x: torch.Tensor, tmp_path: Path
) -> None:
    adapter = make_adapter({"wide": (5, 3)})
    lora_fx.save_adapter(adapter, tmp_path / "or")
    loaded = lora_fx.load_adapter(tmp_path / "or")
    assert loaded.name == "or"
    gm = lora_fx.inject(lora_fx.trace(ragged, (x,)), loaded)
    assert lora_fx.to_onnx(gm, tmp_path / "or.onnx").verified
