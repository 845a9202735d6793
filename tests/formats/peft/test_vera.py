"""VeRA's projections, drawn again as PEFT drew them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from lora_fx.adapters.updates import with_settings
from lora_fx.formats import load_adapter, save_adapter
from lora_fx.formats.peft.vera import VeraConfig
from lora_fx.kinds import KINDS
from lora_fx.layers.base_layers import layers_of
from lora_fx.testing import config_in, save_peft_case


@pytest.mark.parametrize("targets", [["0", "1"], ["0"], ["2"]])
@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_gives_the_numbers_of_peft(seed: int, targets: list[str]) -> None:
    model = nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 5), nn.Linear(5, 13))
    fields = {"r": 2, "save_projection": False, "projection_prng_key": seed}
    wrapped = peft.get_peft_model(model, peft.VeraConfig(target_modules=targets, **fields))
    base = nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 5), nn.Linear(5, 13))
    config = VeraConfig(r=2, save_projection=False, projection_prng_key=seed)
    found = config.projections(targets, {}, layers_of(base))
    for name in ("vera_A", "vera_B"):
        wanted = getattr(wrapped.base_model, name)["default"]
        assert found[name].shape == wanted.shape
        assert torch.equal(found[name], wanted)
    other = replace(config, projection_prng_key=seed + 1)
    assert not torch.equal(
        other.projections(targets, {}, layers_of(base))["vera_A"], found["vera_A"]
    )


def test_a_seed_is_not_written_when_the_widest_layer_is_gone(tmp_path: Path) -> None:
    case = save_peft_case("linear vera seed", tmp_path / "by_peft")
    adapter = load_adapter(case.directory, base=case.base)
    less = replace(adapter, updates={"wide": adapter.updates["wide"]}, expects=None)
    for name, given, is_saved in (("all", adapter, False), ("less", less, True)):
        save_adapter(given, tmp_path / name)
        config = config_in(tmp_path / name)
        assert config["save_projection"] is is_saved
        found = load_adapter(tmp_path / name, base=case.base).updates["wide"]
        wanted = adapter.updates["wide"]
        assert all(map(torch.equal, found.tensors(), wanted.tensors()))
        layer = case.load(tmp_path / name).get_submodule("base_model.model.wide")
        assert torch.allclose(layer.get_delta_weight("default"), found.delta(), atol=1e-6)


def test_one_layer_whose_projections_were_stored_has_all_of_them_stored(tmp_path: Path) -> None:
    case = save_peft_case("linear vera seed", tmp_path / "by_peft")
    adapter = load_adapter(case.directory, base=case.base)
    one = with_settings(adapter.updates["wide"], save_projection=True)
    mixed = replace(adapter, updates={**adapter.updates, "wide": one})
    save_adapter(mixed, tmp_path / "mixed")
    assert config_in(tmp_path / "mixed")["save_projection"] is True
    found = load_adapter(tmp_path / "mixed", base=case.base).updates
    for path, update in adapter.updates.items():
        assert all(map(torch.equal, found[path].tensors(), update.tensors()))


def test_projections_of_two_files_become_lora(tmp_path: Path) -> None:
    case = save_peft_case("linear vera", tmp_path / "by_peft")
    adapter = load_adapter(case.directory, base=case.base)
    stored = adapter.updates["wide"].stored
    assert stored is not None
    other = {**stored.tensors, "vera_A": 2 * stored.tensors["vera_A"]}
    updates = {**adapter.updates, "wide": KINDS["vera"].read(other, stored.settings)}
    save_adapter(replace(adapter, updates=updates), tmp_path / "a")
    assert {u.kind for u in load_adapter(tmp_path / "a").updates.values()} == {"lora"}
