"""Which configs of PEFT's are read by `lora_fx.traced_adapters`, through PEFT itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lora_fx.formats.peft_types import LORA, TYPES

TRACED = (
    "traced"  # the kind of a type without one of ours: the options of its config are all fields
)


def is_traced(fields: Mapping[str, object], types: Collection[str]) -> bool:
    """Whether a config is of a type, or of LoRA with an option, that no kind of ours computes.

    Args:
        fields: of the config.
        types: that the caller reads: one that reads LoRA alone asks no other program.
    """
    name = fields.get("peft_type")
    if set(types) != set(TYPES) or not isinstance(name, str) or not name:
        return False
    if name == LORA.name:
        return any(fields.get(field) not in (None, False, []) for field in LORA.unsupported)
    return name not in TYPES
