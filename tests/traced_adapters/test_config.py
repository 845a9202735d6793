"""What of a config is refused before PEFT sees it, and what PEFT refuses."""

from __future__ import annotations

import builtins
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lora_fx import AdapterError, load_adapter
from lora_fx.formats.peft import CONFIG, read_config
from lora_fx.testing import SavedCase, relative
from lora_fx.traced_adapters.config import TracedConfig, by_peft, parse

Changed = Callable[..., Path]
MINIMAL = {"peft_type": "BOFT", "target_modules": ["wide"]}


def test_without_a_base_the_refusal_says_what_to_do(boft: SavedCase) -> None:
    with pytest.raises(AdapterError, match=r"config\.json: peft_type is 'BOFT'.* pass base="):
        load_adapter(boft.directory)


def test_without_peft_the_refusal_says_what_to_do(boft: SavedCase, monkeypatch: Any) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "peft":
            raise ImportError("No module named 'peft'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(AdapterError, match=r"'BOFT': it is read through PEFT itself.*pip install"):
        load_adapter(boft.directory, base=boft.base)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "os.system"}, r"'os\.system': PEFT [\d.]+ does not know this type"),
        ({"peft_type": "LILY"}, "'LILY', which mixes its factors by what each input is"),
        ({"novel": 3}, "novel is 3, an unknown field"),
        ({"bias": "lora_only"}, "bias is 'lora_only', expected 'none' or 'boft_only' or 'all'"),
        ({"target_modules": ...}, "target_modules is missing"),
        ({"target_modules": "(.*)**X"}, "target_modules: .* is not a regex"),
        ({"target_modules": ["nowhere"]}, "means no layer of the base"),
        ({"boft_block_size": 5}, "PEFT cannot build BOFT here"),
        ({"boft_block_size": 4, "boft_block_num": 2}, "PEFT refuses this config: .*boft_block"),
        ({"boft_block_size": "4"}, "PEFT cannot build BOFT here"),
    ],
)
def test_a_bad_field_is_refused_by_name(
    fields: dict[str, Any], message: str, boft: SavedCase, changed: Changed
) -> None:
    with pytest.raises(AdapterError, match=message):
        load_adapter(changed(boft, **fields), base=boft.base)


def test_a_module_of_the_base_that_was_to_be_saved_has_tensors(
    boft: SavedCase, changed: Changed
) -> None:
    fields = {"target_modules": ["narrow"], "modules_to_save": ["wide"]}
    directory = changed(boft, lambda own: {k: own[k] for k in own if "narrow" in k}, **fields)
    with pytest.raises(AdapterError, match="modules_to_save names 'wide', but no tensor"):
        load_adapter(directory, base=boft.base)


def test_what_is_no_regex_is_refused(hira: SavedCase, changed: Changed) -> None:
    with pytest.raises(AdapterError, match=r"rank_pattern: .* is not a regex"):
        load_adapter(changed(hira, rank_pattern={"(a+)+)": 2}), base=hira.base)


def test_peft_is_told_paths_and_no_regex_of_the_file(hira: SavedCase, changed: Changed) -> None:
    """It would run one without a limit of time."""
    config = read_config(changed(hira, rank_pattern={".*": 2, "x": 3}) / CONFIG, strict=True)
    assert isinstance(config, TracedConfig)
    found = by_peft(config, ["f.x", "a.f.x", "x"]).rank_pattern
    assert found == {r"(?<=^a\.f\.)x$": 2, r"(?<=^f\.)x$": 2, "x": 2}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("FourierFTConfig", {"n_frequency": 7, "n_frequency_pattern": {"fc": 5}}),
        ("C3AConfig", {"block_size": 2, "block_size_pattern": {"a.fc": 4}}),
        ("HiraConfig", {"r": 2, "rank_pattern": {"fc": 3}}),
        ("WaveFTConfig", {"n_frequency": 7, "n_frequency_pattern": {"a.fc": 5}}),
    ],
)
def test_patterns_are_of_layers_inside_of_others(
    tmp_path: Path, kind: str, fields: dict[str, Any]
) -> None:
    """PEFT looks for the keys of some types behind a dot alone: all of them mean one layer here."""
    torch.manual_seed(0)
    inner = nn.ModuleDict({"fc": nn.Linear(8, 8), "fc_b": nn.Linear(8, 8)})
    base: Any = nn.ModuleDict({"a": inner, "fc_b": nn.Linear(8, 8)})
    config = getattr(peft, kind)(target_modules=["fc", "fc_b"], **fields)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    model.save_pretrained(str(tmp_path))
    updates = load_adapter(tmp_path, base=base).updates
    assert sorted(updates) == ["a.fc", "a.fc_b", "fc_b"]
    for path, update in updates.items():
        own, by_peft_ = base.get_submodule(path), model.base_model.model.get_submodule(path)
        x = torch.randn(3, 8)
        want = by_peft_(x) - own.bias
        assert relative(x @ update.weight(own.weight.detach()).T, want.detach()) < 1e-5
        assert relative(x @ own.weight.detach().T, want.detach()) > 1e-2


@pytest.mark.parametrize("field", ["arrow_config", "layer_replication"])
def test_an_option_of_lora_whose_effect_no_weight_has(field: str) -> None:
    fields = {"peft_type": "LORA", "target_modules": ["wide"], field: [1]}
    with pytest.raises(AdapterError, match=rf"{field} is \[1\], a feature that is not supported"):
        parse(fields, "here", strict=True)


def test_alora_beside_an_option_that_peft_reads_for_us_is_refused() -> None:
    fields = {"peft_type": "LORA", "target_modules": ["wide"], "use_qalora": True}
    assert parse(fields, "here", strict=True)
    with pytest.raises(AdapterError, match="use_qalora is True: alora_invocation_tokens are there"):
        parse(fields | {"alora_invocation_tokens": [7, 3]}, "here", strict=True)


def test_what_the_file_names_is_never_imported_or_fetched() -> None:
    fields = {
        "peft_type": "LORA",
        "target_modules": ["wide"],
        "use_qalora": True,
        "megatron_config": {"a": 1},
        "megatron_core": "antigravity",
        "base_model_name_or_path": "somebody/elses",
        "auto_mapping": {"parent_library": "antigravity"},
    }
    config = by_peft(parse(fields, "here", strict=True), ["wide"])
    assert (config.megatron_config, config.base_model_name_or_path) == (None, None)
    assert config.target_modules == {"wide"}
    assert config.use_qalora is True


def test_a_size_that_no_layer_could_have_is_refused_before_it_is_filled(
    hira: SavedCase, changed: Changed
) -> None:
    with pytest.raises(AdapterError, match=r"PEFT cannot build HIRA here: .* numbers at once"):
        load_adapter(changed(hira, r=1 << 40), base=hira.base)
    assert torch.zeros(1 << 22).sum() == 0  # the control: nobody is watched afterwards
