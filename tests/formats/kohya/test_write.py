"""kohya's tensors of updates that other formats were read from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_fx.adapters.adapter import Adapter, Update
from lora_fx.formats import load_adapter, save_adapter
from lora_fx.formats.kohya.write import as_tensor, module_of, problem_with
from lora_fx.kinds import KINDS
from lora_fx.testing import relative

MAKE = torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=MAKE)


def test_a_norm_is_called_as_its_module() -> None:
    update = Update(random(2, 3), random(5, 2), 1.0)
    assert module_of("a.norm.weight", replace(update, kind="norm")) == "a.norm"
    assert module_of("a.norm", update) == "a.norm"


@pytest.mark.parametrize("value", [3.0, 0.1, 16 / 3**0.5])
def test_an_alpha_is_exact(value: float) -> None:
    assert as_tensor(value).item() == value


def lokr(scale: float, second: tuple[int, ...] = (5, 2)) -> Any:
    tensors = {"lokr_w1": random(2, 3), "lokr_w2": random(*second)}
    return KINDS["lokr"].read(tensors, {"scale": scale, "writer": "peft"})


def test_what_peft_wrote_lycoris_reads(tmp_path: Path) -> None:
    update, weight = lokr(1.0), random(10, 6)
    save_adapter(
        Adapter("a", {"fc": update}),
        tmp_path / "a.safetensors",
        format="kohya",
        component="lycoris",
    )
    base = nn.ModuleDict({"fc": nn.Linear(6, 10)})
    found = load_adapter(tmp_path / "a.safetensors", base=base).updates["fc"]
    assert relative(found.weight(weight), update.weight(weight)) <= 1e-6
    assert relative(weight, update.weight(weight)) > 1e-2


def test_what_lycoris_would_read_otherwise_is_a_problem() -> None:
    assert problem_with(lokr(1.0)) is None
    assert problem_with(lokr(1.5)) == "a scale of 1.5 of kind 'lokr'"
    factors = {"lokr_w1": random(2, 3), "lokr_w2_a": random(5, 1), "lokr_w2_b": random(1, 2)}
    low = {scale: KINDS["lokr"].read(factors, {"scale": scale}) for scale in (0.0, 1.5)}
    assert problem_with(low[0.0]) == "a scale of 0, which it reads as 1"
    assert problem_with(low[1.5]) is None
    # PEFT aligns the last axes of the two factors of a Conv1d, LyCORIS the first
    line = problem_with(lokr(1.0, second=(5, 2, 3)))
    assert line == "updates of kind 'lokr', which are no product of two factors"


def test_an_update_that_was_made_of_more_is_written_as_it_was(tmp_path: Path) -> None:
    shapes = {"lora_down.weight": (2, 3, 1, 1), "lora_mid.weight": (2, 2, 4, 4)}
    shapes |= {"lora_up.weight": (6, 2, 1, 1), "alpha": ()}
    state = {f"lycoris_conv.{leaf}": random(*shape).abs() for leaf, shape in shapes.items()}
    save_file(state, tmp_path / "a.safetensors")
    base = nn.ModuleDict({"conv": nn.Conv2d(3, 6, 4)})
    adapter = load_adapter(tmp_path / "a.safetensors", base=base)
    save_adapter(adapter, tmp_path / "b.safetensors", format="kohya", component="lycoris")
    found = load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in state.items())
    save_adapter(adapter, tmp_path / "c.safetensors", format="diffusers", component="unet")
    again = load_adapter(tmp_path / "c.safetensors", component="unet").updates["conv"]
    update = adapter.updates["conv"]
    assert isinstance(again, Update)
    assert isinstance(update, Update)
    assert torch.equal(again.down, update.down)
