"""Fields of adapter_config.json: parsed, or refused by name."""

from __future__ import annotations

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
        ({"rank_pattern": {"(a+)+": 3}}, r"rank_pattern: the regex '\(a\+\)\+'"),
        ({"alpha_pattern": {"a" * 257: 3}}, "alpha_pattern: the regex .* has 257 characters"),
        ({"target_modules": "(.*)*X"}, r"target_modules: the regex '\(\.\*\)\*X'"),
        ({"target_modules": 3}, "target_modules is 3"),
        ({"exclude_modules": "(.*)*X"}, "exclude_modules: the regex"),
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
