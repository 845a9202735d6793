"""Features of PEFT that must be refused by name, and fields that mean nothing here."""

from __future__ import annotations

import dataclasses
import sys

import peft
import pytest

from lora_fx.errors import AdapterError, AdapterWarning
from lora_fx.formats.peft_features import (
    HONOURED,
    NEUTRAL,
    UNSUPPORTED,
    check_features,
    check_init,
)

LORA = {"peft_type": "LORA"}


def test_every_field_that_peft_knows_is_accounted_for_once() -> None:
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert known == HONOURED | NEUTRAL | UNSUPPORTED
    assert len(known) == len(HONOURED) + len(NEUTRAL) + len(UNSUPPORTED)


@pytest.mark.parametrize("field", sorted(UNSUPPORTED))
@pytest.mark.parametrize("value", [True, {}, {"a": 1}, [1], 1, "x"], ids=repr)
def test_an_unsupported_feature_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(AdapterError, match=f"^{field} is .*not supported"):
        check_features({**LORA, field: value})


@pytest.mark.parametrize("field", [*sorted(UNSUPPORTED), "unheard_of"])
@pytest.mark.parametrize("value", [None, False, []], ids=repr)
def test_a_feature_that_is_off_passes(field: str, value: object) -> None:
    check_features({**LORA, field: value})


@pytest.mark.parametrize("value", [True, 1, "x", {"a": 1}], ids=repr)
def test_a_truthy_unknown_field_is_refused_by_name(value: object) -> None:
    with pytest.raises(AdapterError, match=r"^unheard_of is .*unknown field"):
        check_features({**LORA, "unheard_of": value})


@pytest.mark.parametrize("value", ["lora", "ADALORA", None, 1, ["LORA"]], ids=repr)
def test_another_method_is_refused(value: object) -> None:
    with pytest.raises(AdapterError, match=r"peft_type is .* only 'LORA' is supported"):
        check_features({"peft_type": value})


def test_a_missing_method_is_refused() -> None:
    with pytest.raises(AdapterError, match="peft_type is missing"):
        check_features({})


def test_names_of_modules_are_never_imported() -> None:
    mapping = {"parent_library": "this", "base_model_class": "x"}
    sys.modules.pop("this", None)
    check_features({**LORA, "megatron_core": "this", "auto_mapping": mapping})
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
