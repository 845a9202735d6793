"""The config and the tensors that are written, of which PEFT makes the same updates."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_fx import Adapter, AdapterError, Update
from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.adapters.target_rule import TargetRule
from lora_fx.formats import load_adapter, save_adapter
from lora_fx.formats.peft.write import contents
from lora_fx.kinds import KINDS
from lora_fx.testing import config_in, save_peft_case

pytestmark = [
    # PEFT does not see the keys of parameters.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not"),
    # PEFT takes the one-dimensional lora_B.bias for a damaged matrix.
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape"),
]


def update(
    out_size: int, in_size: int, rank: int, scale: float = 1.5, kind: str = "lora"
) -> Update:
    return Update(torch.randn(rank, in_size), torch.randn(out_size, rank), scale, kind)


def test_a_bias_of_some_updates_is_zero_for_the_others(lab: Any, tmp_path: Path) -> None:
    bias = torch.randn(5)
    with_bias = replace(update(5, 3, 2), bias=bias)
    adapter = Adapter("a", {"fc": with_bias, "layers.0": update(7, 5, 2)})
    save_adapter(adapter, tmp_path / "written")
    found = load_adapter(tmp_path / "written").updates
    assert found["fc"].bias is not None
    assert torch.equal(found["fc"].bias, bias)
    assert found["layers.0"].bias is not None
    assert not found["layers.0"].bias.any()
    lab.read("mlp", tmp_path / "written")


def test_trained_and_tied_tensors_are_written(tmp_path: Path) -> None:
    down, up = torch.nn.Parameter(torch.randn(2, 3)), torch.randn(2, 5).T
    tied = Update(down, up, 1.0)
    save_adapter(Adapter("a", {"p": tied, "q": tied}), tmp_path / "written")
    found = load_adapter(tmp_path / "written").updates
    assert torch.equal(found["p"].down, down.detach())
    assert torch.equal(found["q"].up, up)


def test_modules_inside_of_a_saved_module_are_saved_with_it(tmp_path: Path) -> None:
    replaced = {"head.scale": torch.ones(2), "head.fc.weight": torch.ones(2, 3)}
    save_adapter(Adapter("a", {"fc": update(5, 3, 2)}, replaced), tmp_path / "written")
    config = config_in(tmp_path / "written")
    assert config["modules_to_save"] == ["head"]
    assert set(load_adapter(tmp_path / "written").replacements) == set(replaced)


def test_mixed_kinds_ranks_and_scales_become_patterns(lab: Any, tmp_path: Path) -> None:
    updates = {
        "fc": update(5, 3, 2, 1 / 3, "rslora"),
        "layers.0": update(7, 5, 3, 0.1),
        "layers.1": update(6, 7, 3, 0.1),
        "block.fc": update(9, 4, 1, 7.0),
    }
    save_adapter(Adapter("mixed", updates), tmp_path / "written")
    config = config_in(tmp_path / "written")
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
            config = config_in(tmp_path / str(index))
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


def oft(**settings: Any) -> AnyUpdate:
    return KINDS["oft"].read({"oft_R.weight": torch.randn(4, 1)}, settings)


def ia3(feedforward: bool) -> AnyUpdate:
    tensor = torch.randn(1, 5) if feedforward else torch.randn(5, 1)
    return KINDS["ia3"].read({"ia3_l": tensor}, {"feedforward": feedforward})


def written(updates: dict[str, AnyUpdate], path: Path) -> dict[str, Any]:
    save_adapter(Adapter("a", updates), path)
    return config_in(path)


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


NAMES = ("linear loha patterns", "linear lokr patterns", "experts patterns", "attention rslora")


def low(rank: int, scale: float = 1.5) -> Update:
    return Update(torch.randn(rank, 6), torch.randn(6, rank), scale)


@pytest.mark.parametrize("other", [low(3), low(2, 1.0)])
def test_an_output_projection_has_the_rank_of_its_attention(other: Update, tmp_path: Path) -> None:
    adapter = Adapter("a", {"mha": low(2), "mha.out_proj": other})
    with pytest.raises(AdapterError, match=r"these differ: mha\.out_proj"):
        save_adapter(adapter, tmp_path / "a")
    save_adapter(Adapter("a", {"mha": low(2), "mha.out_proj": low(2)}), tmp_path / "a")
    config = config_in(tmp_path / "a")
    assert (config["rank_pattern"], config["target_modules"]) == ({}, "mha")


@pytest.mark.parametrize("name", NAMES)
def test_patterns_give_every_layer_its_rank_and_alpha(name: str, tmp_path: Path) -> None:
    case = save_peft_case(name, tmp_path / "by_peft")
    adapter = load_adapter(case.directory, base=case.base, name="a")
    save_adapter(replace(adapter, expects=None), tmp_path / "written")
    assert str(load_adapter(tmp_path / "written", base=case.base, name="a")) == str(adapter)
