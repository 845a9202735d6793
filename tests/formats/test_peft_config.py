"""Fields of adapter_config.json: parsed, or refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest

from lora_fx.errors import AdapterError
from lora_fx.formats.peft_config import read_config
from lora_fx.formats.peft_record import PeftConfig

MINIMAL = {"peft_type": "LORA", "lora_alpha": 3, "target_modules": ["fc"]}


def read(tmp_path: Path, **fields: Any) -> PeftConfig:
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({k: v for k, v in (MINIMAL | fields).items() if v is not ...}))
    return read_config(file, strict=True)


def test_missing_fields_have_the_defaults_of_peft(tmp_path: Path) -> None:
    config = read(tmp_path)
    defaults = peft.LoraConfig()
    assert config.r == defaults.r
    assert (config.bias, config.use_rslora) == (defaults.bias, defaults.use_rslora)
    assert (config.lora_bias, config.modules_to_save) == (defaults.lora_bias, ())


def test_null_is_missing(tmp_path: Path) -> None:
    config = read(tmp_path, rank_pattern=None, modules_to_save=None, bias=None, layers_pattern=None)
    assert (config.rank_pattern, config.modules_to_save, config.bias) == ({}, (), "none")


def test_the_scale_of_a_path_heeds_both_patterns_and_rslora(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"a": 4}, "alpha_pattern": {"b": 10}}
    config = read(tmp_path, r=2, **patterns)
    assert config.rank_and_scale("x.a") == (4, 3 / 4)
    assert config.rank_and_scale("x.b") == (2, 10 / 2)
    assert config.rank_and_scale("x.c") == (2, 3 / 2)
    config = read(tmp_path, r=2, use_rslora=True, **patterns)
    assert config.rank_and_scale("x.a") == (4, 3 / 2)
    assert config.rank_and_scale("x.b") == (2, 10 / 2**0.5)


def test_heads_of_the_task_are_optional(tmp_path: Path) -> None:
    assert read(tmp_path, task_type="SEQ_CLS").optional_heads == {"classifier", "score"}
    assert read(tmp_path, task_type="CAUSAL_LM").optional_heads == frozenset()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *[({"r": value}, "r is ") for value in (True, 2.0, "8", 0, -1, [8])],
        ({"lora_alpha": ...}, "lora_alpha is missing"),
        *[({"lora_alpha": value}, "lora_alpha is ") for value in (True, "16", None, [16])],
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"rank_pattern": {"fc": 2.5}}, r"rank_pattern\['fc'\] is 2\.5"),
        ({"rank_pattern": ["fc"]}, r"rank_pattern is \['fc'\], expected a dict"),
        ({"alpha_pattern": {"fc": "3"}}, r"alpha_pattern\['fc'\] is '3'"),
        ({"rank_pattern": {"(a+)+)": 3}}, r"rank_pattern: '\(a\+\)\+\)' is not a regex"),
        ({"alpha_pattern": {"(" * 257: 3}}, r"alpha_pattern: .* is not a regex"),
        ({"target_modules": "(.*)**X"}, r"target_modules: '\(\.\*\)\*\*X' is not a regex"),
        ({"target_modules": 3}, "target_modules is 3"),
        ({"exclude_modules": "(.*)**X"}, r"exclude_modules: .* is not a regex"),
        ({"modules_to_save": "head"}, "modules_to_save is 'head', expected a list"),
        ({"modules_to_save": [3]}, r"modules_to_save is \[3\]"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes', expected a bool"),
        ({"use_rslora": 1}, "use_rslora is 1, expected a bool"),
        ({"lora_bias": 0}, "lora_bias is 0, expected a bool"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform is"),
        ({"target_modules": "fc", "layers_to_transform": [1]}, "need target_modules to be a list"),
        ({"layers_pattern": "layers"}, "layers_pattern is given without layers_to_transform"),
    ],
)
def test_a_bad_field_is_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: .*{message}"):
        read(tmp_path, **fields)


def test_a_number_that_overflows_to_infinity_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text('{"peft_type": "LORA", "lora_alpha": 1e999}')
    with pytest.raises(AdapterError, match="lora_alpha is inf, expected a finite number"):
        read_config(file, strict=True)


OF_TYPES: dict[str, dict[str, Any]] = {
    "VERA": {"r": 3, "projection_prng_key": 7},
    "LOHA": {"r": 3, "alpha": 5, "use_effective_conv2d": True},
    "LOKR": {"r": 3, "alpha": 5, "decompose_both": True, "decompose_factor": 4},
    "OFT": {"oft_block_size": 4, "peft_version": "0.21.2", "eps": 1, "block_share": True},
    "IA3": {"feedforward_modules": ["fc"]},
    "ADALORA": {"init_r": 3, "lora_alpha": 5, "rank_pattern": {"fc.lora_E": [True, False, True]}},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2]},
}


@pytest.mark.parametrize("name", OF_TYPES)
def test_every_type_has_a_record_of_its_fields(name: str, tmp_path: Path) -> None:
    fields = OF_TYPES[name]
    config = read(tmp_path, **{"lora_alpha": ..., "peft_type": name, **fields})
    assert config.type.name == name
    options = dataclasses.asdict(config.options)
    assert all(options.get(key, value) == value for key, value in fields.items())
    assert {"rank_pattern", "peft_version", "lora_alpha", "alpha", "r", "init_r"} >= {
        key for key in fields if key not in options
    }


def test_what_is_left_of_a_pruned_layer_is_its_rank(tmp_path: Path) -> None:
    config = read(tmp_path, peft_type="ADALORA", **OF_TYPES["ADALORA"])
    assert (config.rank_and_scale("fc")[0], config.rank_and_scale("other")[0]) == (2, 3)


@pytest.mark.parametrize("name", ["LORA", "OFT", "VERA"])
def test_biases_have_one_name_whatever_the_type_calls_them(name: str, tmp_path: Path) -> None:
    fields = {"peft_type": name, **OF_TYPES.get(name, {"lora_alpha": 3})}
    only = f"{name.lower()}_only"
    assert read(tmp_path, **{"lora_alpha": ..., **fields, "bias": only}).bias == "lora_only"
    with pytest.raises(AdapterError, match=f"bias is 'x_only', expected 'none' or '{only}'"):
        read(tmp_path, **{"lora_alpha": ..., **fields, "bias": "x_only"})


def test_tokens_are_of_one_table_or_of_several(tmp_path: Path) -> None:
    assert read(tmp_path, trainable_token_indices=[3, 1]).tokens == (3, 1)
    assert read(tmp_path, trainable_token_indices={"e": [3, 1]}).tokens == {"e": (3, 1)}
    assert [read(tmp_path, trainable_token_indices=v).tokens for v in (None, [], {})] == [None] * 3


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("LORA", {"trainable_token_indices": [1, -1]}, "expected a list of token ids"),
        ("LORA", {"trainable_token_indices": {"e": ["1"]}}, r"indices\['e'\] is \['1'\]"),
        ("LORA", {"trainable_token_indices": "1"}, "trainable_token_indices is '1'"),
        ("LORA", {"target_parameters": "w"}, "target_parameters is 'w', expected a list"),
        ("LORA", {"ensure_weight_tying": 1}, "ensure_weight_tying is 1, expected a bool"),
        ("TRAINABLE_TOKENS", {"token_indices": [True]}, "token_indices is .*token ids"),
        ("LOKR", {"decompose_factor": True}, "decompose_factor is True, expected a int"),
        ("LOKR", {"alpha": ...}, "alpha is missing"),
        ("LOKR", {"alpha": float("inf")}, "Infinity"),
        ("LOHA", {"r": 0}, "r is 0, expected a positive integer"),
        ("OFT", {"eps": "1"}, "eps is '1', expected a float"),
        ("OFT", {"oft_block_size": ...}, "oft_block_size is missing"),
        ("VERA", {"projection_prng_key": 1.5}, r"projection_prng_key is 1\.5"),
        ("ADALORA", {"rank_pattern": {"fc": 2}}, r"rank_pattern\['fc'\] is 2, expected a list"),
        ("ADALORA", {"rank_pattern": {"fc": [True]}}, r"'fc'\] is .* for <module>\.lora_E"),
        ("ADALORA", {"lora_alpha": ...}, "lora_alpha is missing"),
        ("IA3", {"bias": "all"}, "bias is 'all', an unknown field"),
    ],
)
def test_a_bad_field_of_any_type_is_refused_by_name(
    tmp_path: Path, name: str, fields: dict[str, Any], message: str
) -> None:
    every = {"lora_alpha": ..., **OF_TYPES.get(name, {"lora_alpha": 3}), **fields}
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: .*{message}"):
        read(tmp_path, **{"peft_type": name, **every})
