"""Which fields of PEFT's config may be ignored, and which features must be refused."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Collection, Mapping

from lora_fx.errors import AdapterError, AdapterWarning
from lora_fx.formats.peft_type import PeftType
from lora_fx.formats.peft_types import TYPES

# Fields that say nothing about the result: who made the adapter, and from what.
NEUTRAL = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_version",
        "revision",
        "task_type",
    ]
)
_COMMON = frozenset({"peft_type", "target_modules", "modules_to_save"})
_PATTERNS = frozenset({"rank_pattern", "alpha_pattern"})
# Initial values that leave the base alone, and those that subtract something from its weights.
HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def honoured(kind: PeftType) -> frozenset[str]:
    """The fields of a type's config that decide what is read."""
    names = _COMMON | kind.own | kind.targets
    names |= {field.name for field in dataclasses.fields(kind.options)}
    names |= {kind.rank[0]} if kind.rank else frozenset()
    names |= {kind.alpha, *_PATTERNS} if kind.alpha else frozenset()
    names |= {"bias"} if kind.biases else frozenset()
    return names - kind.neutral


def type_of(fields: Mapping[str, object], types: Collection[str]) -> PeftType:
    """The type that a config names; refuses one that is not supported."""
    supported = ", ".join(types)
    if "peft_type" not in fields:
        raise AdapterError(f"peft_type is missing, expected {supported}")
    name = fields["peft_type"]
    if not isinstance(name, str) or name not in types:
        raise AdapterError(f"peft_type is {name!r:.80}, supported: {supported}")
    return TYPES[name]


def check_features(fields: Mapping[str, object], kind: PeftType) -> None:
    """Refuses every feature of a type that would change the result and is not supported."""
    known = honoured(kind) | kind.neutral | NEUTRAL
    for name, value in fields.items():
        is_off = value is None or value is False or value == []
        if name in kind.unsupported and not is_off:
            raise AdapterError(f"{name} is {value!r:.80}, a feature that is not supported")
        if value and name not in known | kind.unsupported:
            raise AdapterError(
                f"{name} is {value!r:.80}, an unknown field that may change the result; "
                "remove it if it does not"
            )


def check_init(fields: Mapping[str, object], origin: str, strict: bool) -> None:
    """Refuses, or with ``strict=False`` warns of, an initialisation that changed the base."""
    init = fields.get("init_lora_weights")
    if init in HARMLESS_INITS:
        return
    if not isinstance(init, str) or not init.lower().startswith(BASE_CHANGING_INITS):
        raise AdapterError(f"init_lora_weights is {init!r:.80}, a feature that is not supported")
    message = (
        f"init_lora_weights is {init!r}: training changed the base weights too, so the adapter "
        "fits that base alone; save it with PEFT's path_initial_model_for_weight_conversion"
    )
    if strict:
        raise AdapterError(f"{message}, or pass strict=False to use it as it is")
    warnings.warn(f"{origin}: {message}", AdapterWarning, stacklevel=6)


def check_oft(fields: Mapping[str, object], origin: str, strict: bool) -> None:
    """Refuses, or with ``strict=False`` warns of, an OFT of other formulas than today's.

    PEFT changed them in 0.14, with the field oft_block_size, and the series in 0.18, with the
    field peft_version.
    """
    if "oft_block_size" not in fields:
        raise AdapterError(
            "oft_block_size is missing, so it is an OFT of PEFT before 0.14, of other formulas; "
            "train it again with a newer PEFT"
        )
    found = re.match(r"(\d{1,6})\.(\d{1,6})\.", str(fields.get("peft_version")))
    is_new = found is not None and tuple(map(int, found.groups())) >= (0, 18)
    if is_new or fields.get("use_cayley_neumann") is False:
        return
    message = (
        f"peft_version is {fields.get('peft_version')!r}, and PEFT before 0.18 had another series "
        "for use_cayley_neumann; train it again with a newer PEFT"
    )
    if strict:
        raise AdapterError(f"{message}, or pass strict=False to use today's")
    warnings.warn(f"{origin}: {message}", AdapterWarning, stacklevel=6)
