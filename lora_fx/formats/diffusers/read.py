"""The tensors of one component of a diffusers file, as updates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.adapters.source_record import SourceRecord
from lora_fx.adapters.target_rule import TargetRule
from lora_fx.adapters.updates import Update
from lora_fx.errors import AdapterError, shorten, within
from lora_fx.formats.diffusers.keys import LOKR
from lora_fx.formats.layer_tensors import (
    ALPHA,
    BIAS,
    MAGNITUDE,
    Layers,
    Roles,
    check_pairs,
    factors_of,
    scalar_of,
)
from lora_fx.formats.peft.config import PeftConfig, parse
from lora_fx.formats.peft.lora import LoraConfig
from lora_fx.formats.peft.lycoris import LokrConfig
from lora_fx.formats.peft.single_file import METADATA
from lora_fx.kinds import KINDS, dora

Fields = Mapping[str, object]
Part = tuple[dict[str, AnyUpdate], TargetRule | None]


def is_bare(fields: Fields | None) -> bool:
    """Whether one model wrote the file by itself: its fields begin with no component's name."""
    return fields is not None and "peft_type" in fields


def updates_of(
    file: Path, layers: Layers, fields: Fields | None, component: str, strict: bool
) -> Part:
    """The updates of one component, and which layers its config says it adapts.

    Args:
        file: that holds them.
        layers: of the component.
        fields: of the metadata, or None.
        component: its name; ``""`` where the file has no components.
        strict: as in `parse`.

    Raises:
        AdapterError: names the file, the tensor or field, and what is wrong with it.
    """
    lokr = [path for path, roles in layers.items() if roles.keys() & LOKR]
    if lokr and len(lokr) < len(layers):
        raise AdapterError(f"{file}: {lokr[0]} is LoKr, other layers of {component} are LoRA")
    config = _config_of(file, fields, component, LokrConfig if lokr else LoraConfig, strict)
    rule = None if config is None else config.rule
    with within(file):
        if lokr:
            assert config is None or isinstance(config, LokrConfig)
            return _lokr_updates(layers, config), rule
        assert config is None or isinstance(config, LoraConfig)
        check_pairs(layers)
        return _lora_updates(layers, config), rule


def _config_of(
    file: Path, fields: Fields | None, component: str, made: type[PeftConfig], strict: bool
) -> PeftConfig | None:
    """The config of one component, of the type that its tensors are of; None without metadata."""
    if fields is None:
        return None
    start = f"{component}." if component else ""
    own = {key.removeprefix(start): v for key, v in fields.items() if key.startswith(start)}
    if not own:
        raise AdapterError(f"{file}: {METADATA} has no field of {component}, whose tensors it has")
    origin = f"{file}: {METADATA} of {component or 'the model'}"
    return parse({"peft_type": made.peft_type, **own}, origin, strict, {made.peft_type: made})


def _lora_updates(layers: Layers, config: LoraConfig | None) -> dict[str, AnyUpdate]:
    """LoRA or DoRA of every layer of a component.

    Args:
        layers: path -> tensors by role, pairs all of them.
        config: the component's in the metadata, or None.

    Raises:
        AdapterError: shapes or ranks are wrong, some layers have what others lack, or it is not
            clear what the scale is.
    """
    with_alpha = [path for path, roles in layers.items() if ALPHA in roles]
    without = [path for path, roles in layers.items() if ALPHA not in roles]
    if with_alpha and (without or config is not None):
        other = f"none for {shorten(without)}" if without else f"a config in {METADATA}"
        raise AdapterError(f".alpha for {shorten(with_alpha)}, and {other}; which holds?")
    is_dora = _same_for_all(layers, MAGNITUDE, "a magnitude")
    _same_for_all(layers, BIAS, "a bias of its up-projection")
    if config is not None and config.use_dora != is_dora:
        found = "has" if is_dora else "lacks"
        raise AdapterError(
            f"use_dora is {config.use_dora} in {METADATA}, the file {found} magnitudes"
        )
    return {path: _update(path, roles, config) for path, roles in layers.items()}


def _lokr_updates(layers: Layers, config: LokrConfig | None) -> dict[str, AnyUpdate]:
    """LoKr of every layer of a component; without a config alpha is in the weights already.

    Source: ``_create_lokr_config`` of diffusers 0.42.

    Raises:
        AdapterError: shapes are wrong, or the config is.
    """
    updates = {}
    for path, roles in layers.items():
        extra = sorted(roles.keys() - LOKR)
        if extra:
            raise AdapterError(f"{path}: {roles[extra[0]][0]!r} stands beside LoKr's tensors")
        tensors = {leaf: tensor for leaf, (_, tensor) in roles.items()}
        settings: dict[str, object] = {"scale": 1.0, "writer": "peft"}
        with within(path):
            if config is not None:
                settings = config.settings(path, tensors)
            updates[path] = KINDS["lokr"].read(tensors, settings)
    return updates


def _same_for_all(layers: Layers, role: str, what: str) -> bool:
    """Whether all layers have a tensor of a role, as PEFT's one config has it for all or none."""
    having = [path for path, roles in layers.items() if role in roles]
    lacking = [path for path, roles in layers.items() if role not in roles]
    if having and lacking:
        raise AdapterError(f"{shorten(having)} has {what}, {shorten(lacking)} has none")
    return bool(having)


def _update(path: str, roles: Roles, config: LoraConfig | None) -> AnyUpdate:
    down, up = factors_of(roles, grouped=True)
    rank, scale, kind = len(down), 1.0, "lora"
    if config is None:
        alpha = scalar_of(roles)
        scale = 1.0 if alpha is None else alpha / rank
    else:
        expected, scale = config.rank_and_scale(path)
        if rank != expected:
            raise AdapterError(f"{path}: rank {rank}, {METADATA} says {expected}")
        kind = "rslora" if config.use_rslora else "lora"
    bias, stored = roles[BIAS][1] if BIAS in roles else None, None
    if MAGNITUDE in roles:
        stored = SourceRecord({}, {"use_rslora": True}) if kind == "rslora" else None
        kind = "dora"
    magnitude = {"lora_magnitude_vector": roles[MAGNITUDE][1]} if MAGNITUDE in roles else {}
    with within(path):
        update = Update(down, up, scale, kind, bias, stored=stored)
        return dora.with_magnitude(update, magnitude)
