"""Target rules: PEFT's own matching is the oracle."""

from __future__ import annotations

from typing import Any

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lora_fx.adapters.target_rule import (
    TargetRule,
    pattern_matches,
    pattern_value,
    saved_module,
)
from lora_fx.errors import AdapterError

PATHS = [
    "fc",
    "block.fc",
    "xfc",
    "fc.inner",
    "lm_head",
    "head",
    "model.head.dense",
    *[f"model.layers.{i}.{a}.{p}" for i in (0, 1, 10) for a in ("attn", "mlp") for p in ("q", "v")],
    "model.layers.1.experts.0.q",
    "layers.1.q",
    "layers.2.layers.1.q",
    "h.1.q",
]
RULES: list[dict[str, Any]] = [
    {"target_modules": ["fc"]},
    {"target_modules": ["block.fc", "q"]},
    {"target_modules": ["c"]},
    {"target_modules": r".*\.q"},
    {"target_modules": r"fc|block\.fc"},
    {"target_modules": "fc"},
    {"target_modules": ["q", "v"], "exclude_modules": ["attn.q", "fc"]},
    {"target_modules": ["q", "fc"], "exclude_modules": r".*layers\.1.*"},
    {"target_modules": r".*", "exclude_modules": ["q"]},
    {"target_modules": ["q"], "layers_to_transform": 1},
    {"target_modules": ["q"], "layers_to_transform": 0},
    {"target_modules": ["q", "fc"], "layers_to_transform": [0, 10]},
    {"target_modules": ["q", "fc"], "layers_to_transform": []},
    {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": ["experts"]},
    {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": []},
    {"target_modules": r".*", "modules_to_save": ["head"]},
    {"target_modules": ["q", "dense", "fc"], "modules_to_save": ["model.head", "fc"]},
]


@pytest.mark.parametrize("fields", RULES, ids=str)
def test_a_rule_selects_what_peft_selects(fields: dict[str, Any]) -> None:
    config = peft.LoraConfig(**fields)
    expected = [path for path in PATHS if check_target_module_exists(config, path)]
    saved = fields.get("modules_to_save", ())
    rule = TargetRule(
        **{k: v for k, v in fields.items() if k != "modules_to_save"}, saved_modules=saved
    )
    assert [path for path in PATHS if rule.matches(path)] == expected
    assert len(expected) < len(PATHS)


names = st.text("ab.", min_size=1, max_size=5)


@given(names, st.lists(names, max_size=3), st.lists(names, max_size=2))
def test_lists_of_names_are_matched_as_by_peft(
    path: str, targets: list[str], excluded: list[str]
) -> None:
    config = peft.LoraConfig(target_modules=targets, exclude_modules=excluded)
    rule = TargetRule(targets, excluded)
    assert rule.matches(path) == bool(check_target_module_exists(config, path))


@pytest.mark.parametrize("shorthand", ["all-linear", "ALL-LINEAR"])
def test_all_linear_matches_all_but_what_is_excluded(shorthand: str) -> None:
    rule = TargetRule(shorthand, exclude_modules=["fc"], saved_modules=["head"])
    assert rule.is_all_linear
    refused = ["fc", "block.fc", "head", "model.head.dense"]
    assert [path for path in PATHS if not rule.matches(path)] == refused


def test_names_in_a_list_are_no_regexes() -> None:
    assert not TargetRule([".*", "(.*)*X"]).matches("fc")
    assert TargetRule(["(a+)+"]).matches("x.(a+)+")


def test_a_rule_is_a_value() -> None:
    names = ["fc"]
    rule = TargetRule(names)
    names.append("q")
    assert rule == TargetRule(("fc",))
    assert hash(rule) == hash(TargetRule(["fc"]))
    assert "_targets" not in repr(rule)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": "(a"}, r"target_modules: '\(a' is not a regex"),
        ({"exclude_modules": "(a+)+)"}, "exclude_modules: .* is not a regex"),
        (
            {"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "(a+)+)"},
            "layers_pattern: .* is not a regex",
        ),
        ({"saved_modules": ["(a+)+)"]}, "modules_to_save: .* is not a regex"),
        ({"target_modules": 3}, "target_modules is 3"),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": [3]}, r"target_modules is \[3\]"),
        ({"saved_modules": "head"}, "saved_modules is 'head'"),
        ({"layers_to_transform": 1}, "need target_modules to be a list"),
        ({"target_modules": ["q"], "layers_pattern": ["h"]}, "without layers_to_transform"),
        ({"target_modules": ["q"], "layers_to_transform": True}, "layers_to_transform is True"),
        (
            {"target_modules": ["q"], "layers_to_transform": [1.0]},
            r"layers_to_transform is \[1.0\]",
        ),
        ({"target_modules": ["q"], "layers_to_transform": "1"}, "layers_to_transform is '1'"),
    ],
)
def test_a_bad_rule_is_refused_by_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        TargetRule(**fields)


KEYS = ["fc", "q", r"attn\.q", r"layers\.\d+\.mlp\.v", "^fc", "h.1.q", "a|fc", r"^model\.head"]


@pytest.mark.parametrize("path", PATHS)
def test_pattern_keys_mean_what_they_mean_to_peft(path: str) -> None:
    for keys in (KEYS, KEYS[::-1], *[[key] for key in KEYS]):
        expected = get_pattern_key(keys, path)
        found = pattern_value({key: key for key in keys}, path, path)
        assert found == expected
    for key in KEYS:
        assert pattern_matches(key, path) == (get_pattern_key([key], path) == key)


def test_a_pattern_key_is_a_regex_in_its_frame_too() -> None:
    assert pattern_value({"(.*)*X": 3}, "fc", 2) == 2
    with pytest.raises(AdapterError, match=r"as PEFT builds it: .* is not a regex"):
        pattern_value({"(?i)fc": 3}, "fc", 2)


@pytest.mark.parametrize(
    ("path", "modules", "expected"),
    [
        ("head", ["head"], "head"),
        ("model.head.dense", ["head"], "model.head"),
        ("lm_head", ["head"], "lm_head"),
        ("headless", ["head"], None),
        ("a.b.c", ["a.b", "c"], "a.b"),
        ("fc", [], None),
    ],
)
def test_saved_modules_are_matched_as_peft_does(
    path: str, modules: list[str], expected: str | None
) -> None:
    assert saved_module(path, modules) == expected
