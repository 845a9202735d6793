"""Fields of adapter_config.json: each is used, neutral or refused, and by default as PEFT's."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from lora_fx.errors import AdapterError, AdapterWarning
from lora_fx.formats.peft import read_config
from lora_fx.formats.peft.config import PeftConfig
from lora_fx.formats.peft.fields import NEUTRAL, dump, is_required, parse
from lora_fx.formats.peft.types import TYPES

# The fields without which a config of a type is refused.
NEEDED: dict[str, dict[str, Any]] = {
    "LORA": {"lora_alpha": 3},
    "ADALORA": {"lora_alpha": 3},
    "LOHA": {"alpha": 3},
    "LOKR": {"alpha": 3},
    "OFT": {"oft_block_size": 4, "peft_version": "0.21.2"},
}
# Other values than PEFT's defaults.
SET: dict[str, dict[str, Any]] = {
    "LORA": {
        "r": 3, "use_rslora": True, "use_dora": True, "lora_bias": True, "bias": "lora_only",
        "rank_pattern": {"fc": 4}, "alpha_pattern": {"fc": 2.5}, "modules_to_save": ["head"],
        "target_modules": ["fc"], "exclude_modules": ["x"], "layers_to_transform": [1],
        "layers_pattern": ["layers"], "target_parameters": ["a.w"], "init_lora_weights": "gaussian",
        "trainable_token_indices": {"e": [1, 2]}, "ensure_weight_tying": True,
        "task_type": "SEQ_CLS",
    },
    "ADALORA": {
        "init_r": 3, "bias": "all", "rank_pattern": {"fc.lora_E": [True, False, True]},
        "trainable_token_indices": [4],
    },
    "LOHA": {"r": 3, "use_effective_conv2d": True, "rank_pattern": {"fc": 4}},
    "LOKR": {"r": 3, "decompose_both": True, "decompose_factor": 4, "alpha_pattern": {"fc": 4}},
    "VERA": {"r": 3, "projection_prng_key": 7, "save_projection": False, "bias": "vera_only"},
    "IA3": {"feedforward_modules": ["fc"], "target_modules": "fc|x"},
    "OFT": {
        "r": 2, "oft_block_size": 0, "coft": True, "eps": 0.5, "block_share": True,
        "use_cayley_neumann": False, "num_cayley_neumann_terms": 3, "bias": "oft_only",
    },
    "TRAINABLE_TOKENS": {"token_indices": [1, 2]},
}  # fmt: skip
NAMES = [*TYPES]


def peft_fields(name: str) -> dict[str, Any]:
    """The fields of PEFT's own config, and their defaults; ``...`` of one that has none."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)]):
        made = field.default_factory
        default = made() if made is not dataclasses.MISSING else field.default  # type: ignore[misc]
        found[field.name] = default
    return found


def of(name: str, strict: bool = True, **fields: Any) -> PeftConfig:
    every = {"peft_type": name, **NEEDED.get(str(name), {}), **fields}
    return parse({k: v for k, v in every.items() if v is not ...}, "here", strict, TYPES)


def refused(message: str, name: str, **fields: Any) -> None:
    with pytest.raises(AdapterError, match=f"^here: {message}"):
        of(name, **fields)


def each(column: str) -> list[tuple[str, str]]:
    return [(name, field) for name in NAMES for field in sorted(getattr(TYPES[name], column))]


@pytest.mark.parametrize("name", NAMES)
def test_every_field_that_peft_has_is_accounted_for_once(name: str) -> None:
    made = TYPES[name]
    used = {field.name for field in made.used()}
    groups = [used, made.neutral, NEUTRAL, made.refused, {"peft_type"}]
    assert frozenset().union(*groups) == peft_fields(name).keys()
    assert len(peft_fields(name)) == sum(map(len, groups))
    assert made.written.keys() <= made.neutral
    assert set(made.options) <= used


@pytest.mark.parametrize("name", NAMES)
def test_the_defaults_are_those_of_peft(name: str) -> None:
    own = of(name, oft_block_size=32) if name == "OFT" else of(name)
    for field in TYPES[name].used():
        ours, theirs = getattr(own, field.name), peft_fields(name)[field.name]
        assert is_required(field) or (ours or None) == (theirs or None), field.name
        assert is_required(field) or type(ours) is not bool or ours is theirs
        if theirs is not None and not isinstance(theirs, dict | list):
            assert is_required(field) or ours == theirs, field.name


@pytest.mark.parametrize("name", NAMES)
def test_null_is_missing(name: str) -> None:
    needed = {"r", "init_r", "lora_alpha", "alpha"} - ({"r"} if name == "OFT" else set())
    fields = {f.name: None for f in TYPES[name].used() if f.name not in needed}
    assert of(name, **fields | NEEDED.get(name, {})) == of(name)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_what_was_read(name: str) -> None:
    for config in (of(name, **SET[name]), of(name)):
        written = json.loads(json.dumps(dump(config)))
        assert parse(written, "here", True, TYPES) == config
        theirs = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)]
        assert written.keys() <= peft_fields(name).keys()
        if "target_parameters" not in SET[name] or config == of(name):
            theirs(**{k: v for k, v in written.items() if k not in ("peft_type", "peft_version")})
    for field, value in SET[name].items():
        assert dump(of(name, **SET[name]))[field] == value
        assert dump(of(name))[field] != value, "the control: a default would be the same"


@pytest.mark.parametrize("value", [True, {}, {"a": 1}, [1], 1, "x"], ids=repr)
@pytest.mark.parametrize(("name", "field"), each("refused"))
def test_a_feature_is_refused_by_name_unless_it_is_off(
    name: str, field: str, value: object
) -> None:
    refused(f"{field} is .*not supported", name, **{field: value})
    for off in (None, False, []):
        of(name, **{field: off})


@pytest.mark.parametrize(
    ("name", "field"), [*each("neutral"), *(("LORA", f) for f in sorted(NEUTRAL))]
)
def test_a_neutral_field_may_be_anything(name: str, field: str) -> None:
    for value in ("this", 0, {"parent_library": "this"}):
        assert of(name, **{field: value}) == of(name)
    assert "this" not in sys.modules, "names of modules are never imported"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [True, 1, "x", {"a": 1}], ids=repr)
def test_an_unknown_field_is_refused_by_name_unless_it_is_off(name: str, value: object) -> None:
    refused("unheard_of is .*an unknown field", name, unheard_of=value)
    assert of(name, unheard_of=0) == of(name)
    others = {f for made in TYPES.values() for f in (*made.refused, *made.neutral, *made.lacks)}
    for field in others - peft_fields(name).keys():
        refused(f"{field} is .*an unknown field", name, **{field: value})


WRONG: dict[type, tuple[Any, ...]] = {
    bool: ("yes", 1, 0, []),
    int: (True, 1.5, "8", [8]),
    float: (True, "1", []),
    str: (1, True, ["none"], "some"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_value_of_another_type_is_refused_by_name(name: str) -> None:
    tried = 0
    for field, default in peft_fields(name).items():
        is_used = TYPES[name].has(field) and field != "init_lora_weights"
        for value in WRONG.get(type(default), ()) if is_used else ():
            if not (field.endswith("alpha") and value == 1.5):
                refused(f"{field} is {re.escape(repr(value))}", name, **{field: value})
                tried += 1
    assert tried or name in ("IA3", "TRAINABLE_TOKENS")


BAD: list[tuple[str, dict[str, Any], str]] = [
    *[("LORA", {"r": value}, "r is .*, expected a positive integer") for value in (0, -1, None)],
    *[("LORA", {"lora_alpha": a}, "lora_alpha is ") for a in (None, float("inf"), 10**400)],
    *[(n, dict.fromkeys(NEEDED[n], ...), ".*alpha is missing") for n in NAMES[:4]],
    ("LORA", {"rank_pattern": {"fc": 2.5}}, r"rank_pattern\['fc'\] is 2\.5"),
    ("LORA", {"rank_pattern": ["fc"]}, r"rank_pattern is \['fc'\], expected a dict"),
    ("LORA", {"alpha_pattern": {"fc": "3"}}, r"alpha_pattern\['fc'\] is '3'"),
    ("LOHA", {"rank_pattern": {"(a+)+)": 3}}, r"rank_pattern: '\(a\+\)\+\)' is not a regex"),
    ("LORA", {"alpha_pattern": {"(" * 257: 3}}, "alpha_pattern: .* is not a regex"),
    ("LORA", {"target_modules": "(.*)**X"}, r"target_modules: '\(\.\*\)\*\*X' is not a regex"),
    ("LORA", {"target_modules": 3}, "target_modules is 3"),
    ("LORA", {"target_modules": [], "exclude_modules": "(.*)**X"},
     "exclude_modules: .* is not a regex"),
    ("LORA", {"target_modules": [], "layers_to_transform": ["1"]}, "layers_to_transform is"),
    ("LORA", {"target_modules": "f", "layers_to_transform": [1]}, ".* need target_modules to be a"),
    ("LORA", {"target_modules": [], "layers_pattern": "x"}, "layers_pattern is given without"),
    ("LORA", {"modules_to_save": "head"}, "modules_to_save is 'head', expected a list"),
    ("LORA", {"modules_to_save": [3]}, r"modules_to_save is \[3\]"),
    ("LORA", {"target_parameters": "w"}, "target_parameters is 'w', expected a list"),
    ("LORA", {"trainable_token_indices": [1, -1]}, ".* expected a list of token ids"),
    ("LORA", {"trainable_token_indices": {"e": ["1"]}}, r".*indices\['e'\] is \['1'\]"),
    ("LORA", {"trainable_token_indices": "1"}, "trainable_token_indices is '1'"),
    ("TRAINABLE_TOKENS", {"token_indices": [True]}, "token_indices is .*token ids"),
    ("TRAINABLE_TOKENS", {"modules_to_save": ["x"]}, "modules_to_save is .*unknown field"),
    ("ADALORA", {"rank_pattern": {"fc": 2}}, r"rank_pattern\['fc'\] is 2, expected a list"),
    ("ADALORA", {"rank_pattern": {"fc": [True]}}, r".*'fc'\] is .* for <module>\.lora_E"),
    ("ADALORA", {"rank_pattern": {"fc.lora_E": [True, 0, 1]}}, r".*'fc\.lora_E'\] is .* true and"),
    ("IA3", {"feedforward_modules": [3]}, r"feedforward_modules is \[3\], expected a list"),
    ("IA3", {"feedforward_modules": "(.*)**X"}, "feedforward_modules: .* is not a regex"),
    ("IA3", {"bias": "all"}, "bias is 'all', an unknown field"),
    ("OFT", {"oft_block_size": ...}, r"oft_block_size is missing.*before 0\.14"),
    *[(n, {"bias": "x_only"}, "bias is 'x_only', expected 'none' or ") for n in ("LORA", "VERA")],
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "message"), BAD)
def test_a_bad_field_is_refused_by_name(name: str, fields: dict[str, Any], message: str) -> None:
    refused(message, name, **fields)


@pytest.mark.parametrize("value", ["lora", None, 1, ["LORA"], *sorted({*PeftType} - {*TYPES})])
def test_another_method_is_refused(value: Any) -> None:
    refused(r"peft_type is .* supported: LORA, ADALORA, LOHA", value)


def test_a_method_is_one_that_the_caller_reads() -> None:
    refused("peft_type is missing", ...)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match=r"peft_type is 'LOHA', supported: LORA$"):
        parse({"peft_type": "LOHA"}, "here", True, {"LORA": TYPES["LORA"]})


def test_a_file_is_read_strictly(tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    texts = {'{"peft_type": "LORA", "lora_alpha": 1e999}': "lora_alpha is inf, expected a finite"}
    texts |= {'{"r": 1, "r": 2}': "twice", "[]": "holds a list", "": "empty"}
    for text, message in texts.items():
        file.write_text(text)
        with pytest.raises(AdapterError, match=rf"adapter_config\.json: .*{message}"):
            read_config(file, strict=True)


def warned(name: str, message: str, **fields: Any) -> None:
    refused(f"{message}.* strict=False", name, **fields)
    with pytest.warns(AdapterWarning, match=f"^here: {message}"):
        of(name, strict=False, **fields)


def test_an_initialisation_leaves_the_base_alone_or_is_refused() -> None:
    for init in (True, False, None, "gaussian", "eva", "orthogonal", "mica"):
        of("LORA", init_lora_weights=init)
    for init in ("pissa", "pissa_niter_16", "OLoRA", "corda", "loftq", "lora_ga"):
        warned("LORA", f"init_lora_weights is '{init}'", init_lora_weights=init)
    for unknown in ("unheard", "unheard_of", {"a": 1}):
        refused("init_lora_weights is .*not supported", "LORA", init_lora_weights=unknown)
        with pytest.raises(AdapterError, match="not supported"):
            of("LORA", strict=False, init_lora_weights=unknown)


def test_an_oft_is_of_the_series_of_today_or_is_refused() -> None:
    for version in ("0.18.0", "0.21.2", "1.0.0", "0.18.1.dev0@abc"):
        of("OFT", peft_version=version)
    for version in (None, "0.17.1", "0.9.0", "x", 3, "0.17.0.dev0@abc"):  # type: ignore[assignment]
        warned("OFT", "peft_version is ", peft_version=version)
        of("OFT", peft_version=version, use_cayley_neumann=False)


def test_the_scale_of_a_path_heeds_both_patterns_and_rslora() -> None:
    patterns: dict[str, Any] = {"rank_pattern": {"a": 4}, "alpha_pattern": {"b": 10}}
    wanted = {"x.a": (4, 3 / 4), "x.b": (2, 10 / 2), "x.c": (2, 3 / 2)}
    roots = {"x.a": (4, 3 / 2), "x.b": (2, 10 / 2**0.5), "x.c": (2, 3 / 2**0.5)}
    made: Mapping[str, Any] = {name: of(name, r=2, **patterns) for name in ("LORA", "LOHA", "LOKR")}
    for config in made.values():
        assert {path: config.rank_and_scale(path) for path in wanted} == wanted
    rslora: Any = of("LORA", r=2, use_rslora=True, **patterns)
    assert {path: rslora.rank_and_scale(path) for path in roots} == roots


def test_what_is_left_of_a_pruned_layer_is_its_rank() -> None:
    config = of("ADALORA", **SET["ADALORA"])
    assert (config.rank_of("fc"), config.rank_of("other")) == (2, 3)


def test_heads_of_the_task_are_optional() -> None:
    assert of("LORA", task_type="SEQ_CLS").optional_heads == {"classifier", "score"}
    assert of("LORA", task_type="CAUSAL_LM").optional_heads == frozenset()


def test_tokens_are_of_one_table_or_of_several() -> None:
    for value, expected in (
        ([3, 1], (3, 1)),
        ({"e": [3, 1]}, {"e": (3, 1)}),
        ([], None),
        ({}, None),
    ):
        assert of("LORA", trainable_token_indices=value).trainable_token_indices == expected
