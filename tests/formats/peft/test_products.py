"""LoKr that LyCORIS cut, in PEFT's words, and VeRA's projections, drawn again as PEFT drew them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lora_fx import Adapter, AdapterError
from lora_fx.adapters.updates import with_settings
from lora_fx.formats import load_adapter, save_adapter
from lora_fx.formats.peft.products import LokrConfig, VeraConfig
from lora_fx.kinds import KINDS
from lora_fx.layers.base_layers import layers_of
from lora_fx.testing import config_in, means, save_peft_case

Leaves = dict[str, tuple[int, ...]]


FULL: Leaves = {"lokr_w1": (2, 2), "lokr_w2": (6, 4)}  # of 8 -> 12, by a factor of 2
LOW: Leaves = {"lokr_w1": (2, 2), "lokr_w2_a": (6, 1), "lokr_w2_b": (1, 4)}
BOTH: Leaves = {
    "lokr_w1_a": (4, 1),
    "lokr_w1_b": (1, 4),
    "lokr_w2_a": (4, 1),
    "lokr_w2_b": (1, 5),
}  # of 20 -> 16
SECOND: Leaves = {"lokr_w1": (4, 4), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 5)}
CONV: Leaves = {"lokr_w1": (2, 2), "lokr_w2_a": (6, 1), "lokr_w2_b": (1, 36)}
CORE: Leaves = {
    "lokr_w1": (2, 2),
    "lokr_t2": (1, 1, 3, 3),
    "lokr_w2_a": (1, 6),
    "lokr_w2_b": (1, 4),
}
CASES: dict[str, tuple[nn.Module, Leaves]] = {
    "full": (nn.Linear(8, 12), FULL),
    "low": (nn.Linear(8, 12), LOW),
    "both low": (nn.Linear(20, 16), BOTH),
    "the second low": (nn.Linear(20, 16), SECOND),
    "convolution": (nn.Conv2d(8, 12, 3), CONV),
    "core": (nn.Conv2d(8, 12, 3), CORE),
}


def adapter_of(layer: Any, leaves: Leaves, scale: float = 0.75) -> Adapter:
    make = torch.Generator().manual_seed(0)
    tensors = {leaf: torch.randn(shape, generator=make) for leaf, shape in leaves.items()}
    settings = {"scale": scale, "shape": tuple(layer.weight.shape), "writer": "lycoris"}
    return Adapter("a", {"0": KINDS["lokr"].read(tensors, settings)})


@pytest.mark.parametrize("name", CASES)
def test_peft_cuts_the_layer_the_same_way(name: str, tmp_path: Path) -> None:
    layer, leaves = CASES[name]
    torch.manual_seed(0)
    base = nn.Sequential(type(layer)(*sizes(layer)))
    before = base[0].weight.detach().clone()
    adapter = adapter_of(layer, leaves)
    save_adapter(adapter, tmp_path / "a")
    merged = peft.PeftModel.from_pretrained(base, str(tmp_path / "a")).merge_and_unload()
    wanted = merged[0].weight.detach()
    louder = adapter_of(layer, leaves, 0.9).updates["0"]
    means(adapter.updates["0"], before, wanted, louder.weight(before))


def sizes(layer: Any) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels, layer.kernel_size[0]


REFUSED: dict[str, tuple[nn.Module, Leaves]] = {
    "two larger factors": (nn.Linear(8, 12), {"lokr_w1": (6, 4), "lokr_w2": (2, 2)}),
    "a rank that is not low": (nn.Linear(8, 12),
     {"lokr_w1": (2, 2), "lokr_w2_a": (6, 5), "lokr_w2_b": (5, 4)}),
    "two ranks": (nn.Linear(20, 16), {**BOTH, "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 5)}),
    "one axis of a kernel": (nn.Conv1d(8, 12, 3), {"lokr_w1": (2, 2), "lokr_w2": (6, 4, 3)}),
    "a magnitude": (nn.Linear(8, 12), {**FULL, "dora_scale": (12, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_would_cut_otherwise_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no one type of PEFT holds lokr: 0"):
        save_adapter(adapter_of(*REFUSED[name]), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_core_is_of_every_kernel_or_of_none(tmp_path: Path) -> None:
    """PEFT's use_effective_conv2d is of all layers, but gives none to convolutions of points."""
    conv, line = nn.Conv2d(8, 12, 3), nn.Conv2d(8, 12, 1)
    core = adapter_of(conv, CORE).updates["0"]
    for other, leaves, holds in ((line, LOW, True), (conv, CONV, False)):
        adapter = Adapter("a", {"0": core, "1": adapter_of(other, leaves).updates["0"]})
        if holds:
            save_adapter(adapter, tmp_path / "a")
            base = nn.Sequential(nn.Conv2d(8, 12, 3), nn.Conv2d(8, 12, 1))
            peft.PeftModel.from_pretrained(base, str(tmp_path / "a"))
        else:
            with pytest.raises(AdapterError, match="no one type of PEFT holds lokr: 0, 1"):
                save_adapter(adapter, tmp_path / "b")


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


@pytest.mark.parametrize("said", [{}, {"alpha": 0.75}, {"alpha": 4.0}])
def test_an_alpha_that_is_not_the_scale_any_more_is_not_written(said: Any) -> None:
    update = adapter_of(nn.Linear(8, 12), LOW).updates["0"]
    assert LokrConfig.numbers({"0": with_settings(update, **said)}) == {"0": (1, 0.75)}


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
