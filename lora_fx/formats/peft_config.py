"""PEFT's ``adapter_config.json``, parsed once into a typed record."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_fx.adapters.target_rule import TargetRule
from lora_fx.errors import AdapterError, within
from lora_fx.formats.peft_features import check_features, check_init, check_oft, type_of
from lora_fx.formats.peft_fields import (
    alpha_in,
    field_of,
    masks_in,
    names_in,
    options_in,
    patterns_in,
    rank_in,
    tokens_in,
)
from lora_fx.formats.peft_record import PeftConfig
from lora_fx.formats.peft_traced import is_traced
from lora_fx.formats.peft_type import PeftType
from lora_fx.formats.peft_types import LORA, TYPES
from lora_fx.io.strict_json import read_object

# PEFT lists these heads for every model of the task, whatever its own head is called.
TASK_HEADS = {
    "SEQ_CLS": frozenset({"classifier", "score"}),
    "TOKEN_CLS": frozenset({"classifier", "score"}),
    "QUESTION_ANS": frozenset({"qa_outputs"}),
}


def read_config(path: Path, strict: bool) -> PeftConfig:
    """Reads and checks an ``adapter_config.json``.

    Args:
        path: the file.
        strict: refuse an adapter whose initialisation changed the base weights; else warn.

    Raises:
        AdapterError: names the file and the field.
    """
    return parse_config(read_object(path), str(path), strict, tuple(TYPES))


def parse_config(
    fields: Mapping[str, object],
    origin: str,
    strict: bool,
    types: Collection[str] = ("LORA",),
) -> PeftConfig:
    """Checks the fields of a config, wherever they were stored.

    Args:
        fields: of an ``adapter_config.json``.
        origin: where they come from.
        strict: as in `read_config`.
        types: those that the caller knows how to read.

    Raises:
        AdapterError: names the origin and the field.
    """
    with within(origin):
        if is_traced(fields, types):  # no kind of ours: PEFT itself is asked, in a room of its own
            from lora_fx.traced_adapters.config import parse

            return parse(fields, origin, strict)
        kind = type_of(fields, types)
        check_features(fields, kind)
        if kind is LORA:
            check_init(fields, origin, strict)
        if kind.name == "OFT":
            check_oft(fields, origin, strict)
        return _parse(kind, fields)


def _parse(kind: PeftType, fields: Mapping[str, object]) -> PeftConfig:
    """The typed record of fields that are known and supported."""
    saved = names_in(fields, "modules_to_save")
    is_lora = kind is LORA
    ranks, alphas = patterns_in(fields) if kind.alpha and kind.name != "ADALORA" else ({}, {})
    return PeftConfig(
        type=kind,
        r=rank_in(fields, *kind.rank) if kind.rank else 0,
        alpha=alpha_in(fields, kind.alpha) if kind.alpha else 0,
        use_rslora=is_lora and field_of(fields, "use_rslora", False),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        lora_bias=is_lora and field_of(fields, "lora_bias", False),
        bias=_bias(kind, fields),
        modules_to_save=tuple(saved),
        optional_heads=TASK_HEADS.get(str(fields.get("task_type")), frozenset()),
        rule=_rule(kind, fields, saved),
        use_dora=is_lora and field_of(fields, "use_dora", False),
        target_parameters=tuple(names_in(fields, "target_parameters")),
        tokens=tokens_in(fields),
        ties=field_of(fields, "ensure_weight_tying", False),
        masks=masks_in(fields) if kind.name == "ADALORA" else {},
        options=options_in(fields, kind.options),
    )


def _bias(kind: PeftType, fields: Mapping[str, object]) -> str:
    """Which biases the file holds; ``"lora_only"`` whatever the type calls it."""
    bias, known = field_of(fields, "bias", "none"), kind.biases or ("none",)
    if bias not in known:
        raise AdapterError(f"bias is {bias!r}, expected {' or '.join(map(repr, known))}")
    return "lora_only" if bias.endswith("_only") else bias


def _rule(kind: PeftType, fields: Mapping[str, Any], saved: Sequence[str]) -> TargetRule | None:
    """The rule of the config; None where PEFT chooses the modules by the type of the model."""
    targets = fields.get("target_modules")
    if targets is None or kind.kind == "tokens":
        return None
    return TargetRule(
        target_modules=targets,
        exclude_modules=fields.get("exclude_modules") or (),
        layers_to_transform=fields.get("layers_to_transform"),
        layers_pattern=fields.get("layers_pattern") or (),
        saved_modules=saved,
    )
