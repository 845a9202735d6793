"""PEFT's ``adapter_config.json``, parsed once into a typed record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lora_fx.config import checked_alpha, checked_alphas, checked_rank, checked_ranks, scale_of
from lora_fx.errors import AdapterError
from lora_fx.formats.peft_features import check_features, check_init
from lora_fx.formats.strict_json import read_object
from lora_fx.targets import TargetRule, pattern_value

T = TypeVar("T")

# PEFT lists these heads for every model of the task, whatever its own head is called.
TASK_HEADS = {
    "SEQ_CLS": frozenset({"classifier", "score"}),
    "TOKEN_CLS": frozenset({"classifier", "score"}),
    "QUESTION_ANS": frozenset({"qa_outputs"}),
}


@dataclass(frozen=True)
class PeftLora:
    """The fields of a PEFT LoRA config that decide what the adapter computes.

    Attributes:
        r: rank where ``rank_pattern`` names none.
        alpha: alpha where ``alpha_pattern`` names none.
        use_rslora: scale by alpha / sqrt(r).
        rank_pattern: regex of a path -> rank.
        alpha_pattern: regex of a path -> alpha.
        lora_bias: the up-projections have biases.
        bias: ``"none"``, ``"lora_only"`` (of adapted layers) or ``"all"``.
        modules_to_save: ends of paths of modules stored whole.
        optional_heads: those of them that the model need not have.
        rule: which modules the adapter acts on, or None where the config leaves that to PEFT.
    """

    r: int
    alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    lora_bias: bool = False
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    optional_heads: frozenset[str] = frozenset()
    rule: TargetRule | None = None

    def rank_and_scale(self, path: str) -> tuple[int, float]:
        """The rank and the scale of the module at a path, after both patterns."""
        rank = pattern_value(self.rank_pattern, path, self.r)
        alpha = pattern_value(self.alpha_pattern, path, self.alpha)
        return rank, scale_of(alpha, rank, self.use_rslora)


def read_config(path: Path, strict: bool) -> PeftLora:
    """Reads and checks an ``adapter_config.json``.

    Args:
        path: the file.
        strict: refuse an adapter whose initialisation changed the base weights; else warn.

    Raises:
        AdapterError: names the file and the field.
    """
    return parse_config(read_object(path), str(path), strict)


def parse_config(fields: Mapping[str, object], origin: str, strict: bool) -> PeftLora:
    """Checks the fields of a config, wherever they were stored.

    Args:
        fields: of an ``adapter_config.json``.
        origin: where they come from, for messages.
        strict: as in `read_config`.

    Raises:
        AdapterError: names the origin and the field.
    """
    try:
        check_features(fields)
        check_init(fields, origin, strict)
        return _parse(fields)
    except AdapterError as error:
        raise AdapterError(f"{origin}: {error}") from error


def _parse(fields: Mapping[str, object]) -> PeftLora:
    """The typed record of fields that are known and supported."""
    if "lora_alpha" not in fields:
        raise AdapterError("lora_alpha is missing; without it the scale is unknown")
    saved: list[str] = _field(fields, "modules_to_save", [])
    if not all(isinstance(name, str) and name for name in saved):
        raise AdapterError(f"modules_to_save is {saved!r:.80}, expected a list of names")
    bias = _field(fields, "bias", "none")
    if bias not in ("none", "lora_only", "all"):
        raise AdapterError(f"bias is {bias!r}, expected 'none', 'lora_only' or 'all'")
    return PeftLora(
        r=checked_rank("r", fields.get("r", 8)),
        alpha=checked_alpha("lora_alpha", fields["lora_alpha"]),
        use_rslora=_field(fields, "use_rslora", False),
        rank_pattern=checked_ranks(_field(fields, "rank_pattern", {})),
        alpha_pattern=checked_alphas(_field(fields, "alpha_pattern", {})),
        lora_bias=_field(fields, "lora_bias", False),
        bias=bias,
        modules_to_save=tuple(saved),
        optional_heads=TASK_HEADS.get(str(fields.get("task_type")), frozenset()),
        rule=_rule(fields, saved),
    )


def _rule(fields: Mapping[str, Any], saved: list[str]) -> TargetRule | None:
    """The rule of the config; None where PEFT chooses the modules by the type of the model."""
    if fields.get("target_modules") is None:
        return None
    return TargetRule(
        target_modules=fields["target_modules"],
        exclude_modules=fields.get("exclude_modules") or (),
        layers_to_transform=fields.get("layers_to_transform"),
        layers_pattern=fields.get("layers_pattern") or (),
        saved_modules=saved,
    )


def _field(fields: Mapping[str, object], name: str, default: T) -> T:
    """A field, or the default where it is missing or null; refuses another type."""
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, type(default)):
        raise AdapterError(f"{name} is {value!r:.80}, expected a {type(default).__name__}")
    return value
