"""Features of PEFT that must be refused by name, and fields that mean nothing here."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType

from lora_fx.errors import AdapterError, AdapterWarning
from lora_fx.formats.peft_features import (
    NEUTRAL,
    check_features,
    check_init,
    check_oft,
    honoured,
    type_of,
)
from lora_fx.formats.peft_type import PeftType as Type
from lora_fx.formats.peft_types import LORA, TYPES

UNSUPPORTED = sorted(LORA.unsupported)


def config_of(kind: Type) -> Any:
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind.name)]


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
def test_every_field_that_peft_knows_is_accounted_for_once(kind: Type) -> None:
    known = {field.name for field in dataclasses.fields(config_of(kind))}
    groups = [honoured(kind), kind.neutral, NEUTRAL, kind.unsupported]
    assert known <= frozenset().union(*groups)
    assert len(frozenset().union(*groups)) == sum(map(len, groups))
    own = {field.name for field in dataclasses.fields(kind.options)}
    assert own | kind.own | kind.neutral | kind.unsupported | kind.targets <= known


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
def test_the_defaults_are_those_of_peft(kind: Type) -> None:
    defaults = {f.name: f.default for f in dataclasses.fields(config_of(kind))}
    for field in dataclasses.fields(kind.options):
        assert field.name == "token_indices" or field.default == defaults[field.name]
    if kind.rank is not None:
        assert defaults[kind.rank[0]] == kind.rank[1]


@pytest.mark.parametrize("field", UNSUPPORTED)
@pytest.mark.parametrize("value", [True, {}, {"a": 1}, [1], 1, "x"], ids=repr)
def test_an_unsupported_feature_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(AdapterError, match=f"^{field} is .*not supported"):
        check_features({field: value}, LORA)


@pytest.mark.parametrize("field", ["use_dora", "target_parameters", *UNSUPPORTED])
def test_adalora_has_fewer_features_than_lora(field: str) -> None:
    with pytest.raises(AdapterError, match=f"^{field} is .*not supported"):
        check_features({field: {"a": 1}}, TYPES["ADALORA"])


@pytest.mark.parametrize("field", [*UNSUPPORTED, "unheard_of"])
@pytest.mark.parametrize("value", [None, False, []], ids=repr)
def test_a_feature_that_is_off_passes(field: str, value: object) -> None:
    check_features({field: value}, LORA)


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("value", [True, 1, "x", {"a": 1}], ids=repr)
def test_a_truthy_unknown_field_is_refused_by_name(kind: Type, value: object) -> None:
    with pytest.raises(AdapterError, match=r"^unheard_of is .*unknown field"):
        check_features({"unheard_of": value}, kind)


OTHERS = sorted(set(PeftType) - set(TYPES))


@pytest.mark.parametrize("value", ["lora", None, 1, ["LORA"], *OTHERS], ids=str)
def test_another_method_is_refused(value: object) -> None:
    with pytest.raises(AdapterError, match=r"peft_type is .* supported: LORA, ADALORA, LOHA"):
        type_of({"peft_type": value}, TYPES)


def test_a_caller_that_reads_lora_alone_is_given_no_other() -> None:
    with pytest.raises(AdapterError, match=r"peft_type is 'LOHA', supported: LORA$"):
        type_of({"peft_type": "LOHA"}, ("LORA",))


def test_a_missing_method_is_refused() -> None:
    with pytest.raises(AdapterError, match="peft_type is missing"):
        type_of({}, TYPES)


def test_names_of_modules_are_never_imported() -> None:
    mapping = {"parent_library": "this", "base_model_class": "x"}
    sys.modules.pop("this", None)
    check_features({"megatron_core": "this", "auto_mapping": mapping}, LORA)
    assert "this" not in sys.modules


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_an_initialisation_that_leaves_the_base_alone_passes(init: object) -> None:
    check_init({"init_lora_weights": init}, "here", strict=True)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "OLoRA", "corda", "loftq", "lora_ga"])
def test_an_initialisation_that_changed_the_base_is_refused_or_warned_of(init: str) -> None:
    with pytest.raises(AdapterError, match=f"init_lora_weights is '{init}'.*strict=False"):
        check_init({"init_lora_weights": init}, "here", strict=True)
    with pytest.warns(AdapterWarning, match=f"^here: init_lora_weights is '{init}'"):
        check_init({"init_lora_weights": init}, "here", strict=False)


@pytest.mark.parametrize("init", ["mica", "unheard_of", {"a": 1}], ids=repr)
@pytest.mark.parametrize("strict", [True, False])
def test_an_unknown_initialisation_is_refused(init: object, strict: bool) -> None:
    with pytest.raises(AdapterError, match=r"init_lora_weights is .*not supported"):
        check_init({"init_lora_weights": init}, "here", strict)


@pytest.mark.parametrize("version", [None, "0.17.1", "0.9.0", "x", 3, "0.17.0.dev0@abc"], ids=repr)
def test_an_oft_of_another_series_is_refused_or_warned_of(version: object) -> None:
    fields = {"oft_block_size": 4, "peft_version": version}
    with pytest.raises(AdapterError, match=r"peft_version is .* strict=False"):
        check_oft(fields, "here", strict=True)
    with pytest.warns(AdapterWarning, match="^here: peft_version is"):
        check_oft(fields, "here", strict=False)
    check_oft({**fields, "use_cayley_neumann": False}, "here", strict=True)


@pytest.mark.parametrize("version", ["0.18.0", "0.21.2", "1.0.0", "0.18.1.dev0@abc"])
def test_an_oft_of_today_passes(version: str) -> None:
    check_oft({"oft_block_size": 4, "peft_version": version}, "here", strict=True)


def test_an_oft_before_blocks_had_a_size_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"oft_block_size is missing.*before 0\.14"):
        check_oft({"r": 4, "peft_version": "0.21.2"}, "here", strict=False)
