"""A config of PEFT's whose type has no kind of ours: checked here, then built by PEFT."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from lora_fx.adapters.safe_regex import check_regexes
from lora_fx.adapters.target_rule import pattern_value
from lora_fx.errors import AdapterError, within
from lora_fx.formats.peft.config import PeftConfig
from lora_fx.formats.peft.fields import NEUTRAL, refused_in, values_of
from lora_fx.formats.peft.lora import LoraConfig, check_init
from lora_fx.traced_adapters.reasons import refuse_what_is_not_affine

INSTALL = "install it (pip install peft)"
# What is of the whole model: it is read here, and PEFT is told of the adapted layers alone.
_OURS: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "revision": None,
    "task_type": None,
    "inference_mode": True,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "modules_to_save": None,
    "bias": "none",
    "progressbar": False,
    "ensure_weight_tying": False,
    "trainable_token_indices": None,
    # What only makes a start, and would change the base for it; and what names a package.
    "init_lora_weights": True,
    "megatron_config": None,
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
}
_UNREAD = ("target_parameters", "trainable_token_indices", "token_indices")


@dataclasses.dataclass(frozen=True, kw_only=True)
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


def parse(fields: Mapping[str, object], origin: str, strict: bool) -> TracedConfig:
    """What of a config says which layers are adapted, and what stands beside them.

    Args:
        fields: of an ``adapter_config.json``, strictly read.
        origin: where they come from.
        strict: as `lora_fx.load_adapter` takes it.

    Raises:
        AdapterError: names the type or the field.
    """
    refuse_what_is_not_affine(str(fields["peft_type"]), fields)
    with within(named(fields)):
        return _parsed(str(fields["peft_type"]), fields, origin, strict)


def named(fields: Mapping[str, object]) -> str:
    """What of a config is no kind of ours, for a message: its type, or an option of LoRA."""
    name = fields["peft_type"]
    on = refused_in(fields, LoraConfig) if name == LoraConfig.peft_type else []
    return f"{on[0]} is {fields[on[0]]!r:.80}" if on else f"peft_type is {name!r:.80}"


def _parsed(name: str, fields: Mapping[str, object], origin: str, strict: bool) -> TracedConfig:
    _check_fields(name, fields)
    if name == LoraConfig.peft_type and fields.get("init_lora_weights") is not None:
        check_init(fields["init_lora_weights"], origin, strict)
    if fields.get("alora_invocation_tokens"):
        raise AdapterError(
            "alora_invocation_tokens are there too, and PEFT does not run the two together; "
            "leave one of them out"
        )
    if fields.get("target_modules") is None:
        raise AdapterError("target_modules is missing; name the modules that are adapted")
    return TracedConfig(name=name, given=fields, **values_of(fields, PeftConfig))


def by_peft(config: TracedConfig, paths: Sequence[str]) -> Any:
    """PEFT's own config, for some layers alone.

    Raises:
        AdapterError: PEFT refuses it; says why.
    """
    known = _class_of(config.name)
    names = {field.name for field in dataclasses.fields(known)}
    fields = {**config.given, **_OURS, "target_modules": list(paths)}
    fields |= {name: _by_path(p, paths) for name, p in fields.items() if _are_patterns(p, name)}
    try:
        return known(
            **{name: value for name, value in fields.items() if name in names - {"peft_type"}}
        )
    except Exception as error:  # PEFT's own code may raise anything
        raise AdapterError(f"PEFT refuses this config: {error}") from error


def _are_patterns(value: object, name: str) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, dict) and name.endswith("_pattern")


def _by_path(patterns: Mapping[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """What patterns say of each path, longer paths first: PEFT runs no regex of the file's.

    Some of its types look for a key behind a dot alone (FourierFT, C3A), and others anywhere: a
    path is its last part, behind all others.
    """
    said = {path: pattern_value(patterns, path, None) for path in paths}
    ordered = sorted(paths, key=len, reverse=True)
    return {_exactly(path): said[path] for path in ordered if said[path] is not None}


def _exactly(path: str) -> str:
    owner, dot, leaf = path.rpartition(".")
    last = re.escape(leaf)
    return rf"(?<=^{re.escape(owner + dot)}){last}$" if dot else last


def _class_of(name: str) -> Any:
    """The class of a type's config, out of PEFT's own table."""
    try:
        import peft
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError as error:
        raise AdapterError(
            f"it is read through PEFT itself, which cannot be imported ({error}): {INSTALL}"
        ) from error
    table = {
        str(getattr(kind, "value", kind)): made
        for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    }
    if name not in table:
        raise AdapterError(
            f"PEFT {peft.__version__} does not know this type; correct it, or install a newer PEFT"
        )
    return table[name]


def _check_fields(name: str, fields: Mapping[str, object]) -> None:
    known = {field.name for field in dataclasses.fields(_class_of(name))}
    for field, value in fields.items():
        if value and field not in known | NEUTRAL:
            raise AdapterError(
                f"{field} is {value!r:.80}, an unknown field that may change the result; "
                "remove it if it does not, or install a newer PEFT"
            )
        if value and field in _UNREAD:
            raise AdapterError(f"{field} is {value!r:.80}, which is not supported beside {name}")
        if _are_patterns(value, field):
            check_regexes(value, field)
