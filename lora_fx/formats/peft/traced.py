"""Configs of PEFT's that `lora_fx.traced_adapters` reads, through PEFT itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora_fx.errors import within
from lora_fx.formats.peft.config import PeftConfig, parse
from lora_fx.formats.peft.lora import LoraConfig
from lora_fx.formats.peft.types import TYPES


@dataclass(frozen=True, kw_only=True)
class TracedConfig(PeftConfig):
    """A config whose type, or an option of LoRA's, has no kind of ours.

    Attributes:
        name: of the type.
        given: all of its fields.
    """

    name: str
    given: Mapping[str, object]

    @property
    def only_bias(self) -> str:  # type: ignore[override]  # known with the name
        """What ``bias`` is called where biases of adapted layers alone are stored."""
        return f"{self.name.lower()}_only"


def is_traced(fields: Mapping[str, object]) -> bool:
    """Whether a config is of a type, or of LoRA with an option, that no kind of ours computes."""
    name = fields.get("peft_type")
    if not isinstance(name, str) or not name:
        return False
    if name == LoraConfig.peft_type:
        return any(fields.get(field) not in (None, False, []) for field in LoraConfig.refused)
    return name not in TYPES


def parse_any(fields: Mapping[str, object], origin: str, strict: bool) -> PeftConfig:
    """Checks the fields of a config of any type, as `config.parse` does.

    Raises:
        AdapterError: names the origin and the field.
    """
    if not is_traced(fields):
        return parse(fields, origin, strict, TYPES)
    from lora_fx.traced_adapters.config import parse as parse_traced

    with within(origin):
        return parse_traced(fields, origin, strict)
