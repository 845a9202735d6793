"""The config that is written: PEFT makes the same ranks, scales and targets of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_fx.adapters.adapter import Adapter, Update
from lora_fx.adapters.target_rule import TargetRule
from lora_fx.formats import load_adapter, save_adapter
from lora_fx.formats.peft.write import contents


def update(
    out_size: int, in_size: int, rank: int, scale: float = 1.5, kind: str = "lora"
) -> Update:
    return Update(torch.randn(rank, in_size), torch.randn(out_size, rank), scale, kind)


def test_mixed_kinds_ranks_and_scales_become_patterns(lab: Any, tmp_path: Path) -> None:
    updates = {
        "fc": update(5, 3, 2, 1 / 3, "rslora"),
        "layers.0": update(7, 5, 3, 0.1),
        "layers.1": update(6, 7, 3, 0.1),
        "block.fc": update(9, 4, 1, 7.0),
    }
    save_adapter(Adapter("mixed", updates), tmp_path / "written")
    config = json.loads((tmp_path / "written" / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["r"]) == (False, 3)
    assert config["rank_pattern"] == {"^fc": 2, r"^block\.fc": 1}
    found = load_adapter(tmp_path / "written").updates
    for path, u in updates.items():
        assert math.isclose(found[path].scale, u.scale, rel_tol=2.3e-16)  # the last bit
        assert not math.isclose(found[path].scale, 0.9 * u.scale, rel_tol=2.3e-16)
    model = lab.read("mlp", tmp_path / "written").get_base_model()
    for path, u in updates.items():
        layer = model.get_submodule(path)
        assert layer.scaling["default"] == found[path].scale
        assert torch.equal(layer.lora_A["default"].weight, u.down)


@pytest.mark.parametrize("kind", ["lora", "rslora"])
@pytest.mark.parametrize("rank", range(1, 65))
def test_every_scale_comes_back_exactly(tmp_path: Path, rank: int, kind: str) -> None:
    divisor = rank if kind == "lora" else rank**0.5
    for index, alpha in enumerate((1, 16, 0.3, 3e-5)):
        wanted = Adapter("a", {"fc": update(5, 3, rank, alpha / divisor, kind)})
        save_adapter(wanted, tmp_path / str(index))
        found = load_adapter(tmp_path / str(index)).updates["fc"]
        assert (found.scale, found.kind) == (wanted.updates["fc"].scale, kind)
        if alpha == 16:
            config = json.loads((tmp_path / str(index) / "adapter_config.json").read_text())
            assert config["lora_alpha"] == 16


def test_the_rule_is_kept_unless_it_is_all_linear_or_contradicted(tmp_path: Path) -> None:
    updates = {"a.fc": update(5, 3, 2)}
    for index, (rule, expected) in enumerate(
        [
            (TargetRule("a.*"), "a.*"),
            (TargetRule(["fc"]), ("fc",)),
            (TargetRule("all-linear"), ("a.fc",)),
            (TargetRule(["other"]), ("a.fc",)),
            (None, ("a.fc",)),
        ]
    ):
        save_adapter(Adapter("a", updates, expects=rule), tmp_path / str(index))
        found = load_adapter(tmp_path / str(index)).expects
        assert found is not None
        assert found.target_modules == expected


def test_paths_at_the_root_become_a_regex_if_it_fits() -> None:
    def targets(*paths: str) -> object:
        updates = {path: update(5, 3, 2) for path in paths}
        return contents(Adapter("a", updates))[0]["target_modules"]

    assert targets("fc", "b.fc") == r"b\.fc|fc"
    assert targets("a.fc", "b.fc") == ["a.fc", "b.fc"]
    assert targets("fc", "b" * 300) == ["b" * 300, "fc"]


@pytest.mark.parametrize(
    ("names", "saved", "expected"),
    [
        ([], [], "none"),
        (["fc.bias"], [], "lora_only"),
        (["fc.bias", "norm.bias"], [], "all"),
        (["head.weight", "head.bias"], ["head"], "none"),
        (["head.weight", "head.bias", "fc.bias"], ["head"], "lora_only"),
    ],
)
def test_the_bias_mode_is_the_narrowest_that_holds_all(
    names: list[str], saved: list[str], expected: str
) -> None:
    replaced = {name: torch.ones(5) for name in names}
    adapter = Adapter("a", {"fc": update(5, 3, 2)}, replaced)
    fields, _ = contents(adapter)
    assert (fields["bias"], fields["modules_to_save"]) == (expected, saved or None)
