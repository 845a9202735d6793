"""What was trained beside a changed base, said again for the base itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lora_fx import Adapter, LoraConfig, Update, combine, load_adapter
from lora_fx.adapters.initialization import olora_factors, pissa_factors


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def converted(trained: Update, started: Update) -> Any:
    """The update of the original base, as the README says it."""
    pairs = [(Adapter("trained", {"fc": trained}), 1.0), (Adapter("started", {"fc": started}), -1)]
    return combine(pairs).updates["fc"]


def test_pissa_takes_the_first_singular_values_half_on_either_side() -> None:
    weight = random(0, 5, 3)
    down, up = pissa_factors(weight, 2, 1.5)
    rows, values, columns = torch.linalg.svd(weight, full_matrices=False)
    first = rows[:, :2] @ torch.diag(values[:2]) @ columns[:2]
    assert distance(1.5 * up @ down, first) <= 1e-6
    assert distance(up @ down, first) > 1e-2
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))


def test_olora_s_up_is_orthonormal() -> None:
    down, up = olora_factors(random(0, 5, 3), 2)
    assert distance(up.T @ up, torch.eye(2)) <= 1e-6
    assert down.shape == (2, 3)
    assert distance(up @ down, random(0, 5, 3)) > 1e-2


@pytest.mark.parametrize("how", ["pissa", "olora", "pissa_niter_4"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_converted_update_does_to_the_base_what_the_trained_does_to_the_residual(
    how: str, use_rslora: bool
) -> None:
    weight = random(0, 5, 3)
    config = LoraConfig(r=2, alpha=3, init=how, use_rslora=use_rslora, seed=0)
    started, residual = config.fresh(
        "fc", (5, 3), weight=weight.clone, generator=config.make_generator()
    )
    assert residual is not None
    trained = Update(
        started.down + random(1, 2, 3), started.up + random(2, 5, 2), started.scale, started.kind
    )
    wanted = trained.weight(residual)
    update = converted(trained, started)
    assert update.rank == 4
    assert distance(update.weight(weight), wanted) <= 1e-6
    assert distance(trained.weight(weight), wanted) > 1e-2


# PEFT, where its own recipe loads what started beside what was trained.
@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights of the model")
def test_it_is_what_peft_saves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.ModuleDict({"fc": nn.Linear(7, 9)})
    weight = base["fc"].weight.detach().clone()
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["fc"], init_lora_weights="pissa")
    model = peft.get_peft_model(base, config)
    layer: Any = model.get_base_model().get_submodule("fc")
    # PEFT's own recipe: what started is saved as if it were plain, or loading would start anew.
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "started")
    model.peft_config["default"].init_lora_weights = "pissa"

    def read() -> Update:
        factors = (f["default"].weight.detach().clone() for f in (layer.lora_A, layer.lora_B))
        return Update(*factors, layer.scaling["default"])

    started = read()
    with torch.no_grad():
        for factor in (layer.lora_A, layer.lora_B):
            factor["default"].weight.add_(1.0)
    trained = read()
    model.save_pretrained(
        tmp_path / "saved", path_initial_model_for_weight_conversion=str(tmp_path / "started")
    )
    theirs = load_adapter(tmp_path / "saved").updates["fc"]
    ours = converted(trained, started)
    assert distance(ours.weight(weight), theirs.weight(weight)) <= 1e-6
    assert distance(trained.weight(weight), theirs.weight(weight)) > 1e-2
