"""Fields that all layers of a config share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_fx import Adapter, AdapterError
from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.formats import load_adapter, save_adapter
from lora_fx.kinds import KINDS


def oft(**settings: Any) -> AnyUpdate:
    return KINDS["oft"].read({"oft_R.weight": torch.randn(4, 1)}, settings)


def ia3(feedforward: bool) -> AnyUpdate:
    tensor = torch.randn(1, 5) if feedforward else torch.randn(5, 1)
    return KINDS["ia3"].read({"ia3_l": tensor}, {"feedforward": feedforward})


def written(updates: dict[str, AnyUpdate], path: Path) -> dict[str, Any]:
    save_adapter(Adapter("a", updates), path)
    fields: dict[str, Any] = json.loads((path / "adapter_config.json").read_text())
    return fields


def test_layers_that_disagree_are_refused(tmp_path: Path) -> None:
    updates = {"p": oft(), "q": oft(num_cayley_neumann_terms=3)}
    with pytest.raises(AdapterError, match=r"one num_cayley_neumann_terms .* 5 at p; 3 at q"):
        save_adapter(Adapter("a", updates), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_what_the_layers_agree_on_is_in_the_config(tmp_path: Path) -> None:
    updates = {"p": oft(num_cayley_neumann_terms=3), "q": oft(num_cayley_neumann_terms=3)}
    fields = written(updates, tmp_path / "a")
    assert (fields["num_cayley_neumann_terms"], fields["use_cayley_neumann"]) == (3, True)


def test_the_layers_scaled_at_their_input_are_meant_alone(tmp_path: Path) -> None:
    updates = {"fc": ia3(True), "block.fc": ia3(False), "proj": ia3(True)}
    assert written(updates, tmp_path / "a")["feedforward_modules"] == "fc|proj"
    found = load_adapter(tmp_path / "a").updates
    kept = {path: u.stored.settings["feedforward"] for path, u in found.items() if u.stored}
    assert kept == {"fc": True, "block.fc": False, "proj": True}


def test_many_such_layers_become_a_list_if_that_means_no_other(tmp_path: Path) -> None:
    paths = [f"layers.{index}.{'x' * 30}" for index in range(12)]
    updates = dict.fromkeys(paths, ia3(True))
    assert written(updates, tmp_path / "a")["feedforward_modules"] == sorted(paths)
    with pytest.raises(AdapterError, match=r"feedforward_modules would mean m\.layers\.0\.x"):
        save_adapter(Adapter("a", {**updates, f"m.{paths[0]}": ia3(False)}), tmp_path / "b")
