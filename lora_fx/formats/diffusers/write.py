"""An adapter as the tensors and the metadata of a diffusers file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.adapters.parameter_updates import name_of
from lora_fx.adapters.source_record import is_embedding
from lora_fx.adapters.target_rule import TargetRule
from lora_fx.adapters.updates import Update
from lora_fx.errors import AdapterError, shorten, within
from lora_fx.formats.dialects import check_held, not_lora
from lora_fx.formats.diffusers import COMPONENTS, LOKR
from lora_fx.formats.hints import Hints
from lora_fx.formats.peft import METADATA
from lora_fx.formats.peft.config import PeftConfig
from lora_fx.formats.peft.fields import dump
from lora_fx.formats.peft.lora import LoraConfig
from lora_fx.formats.peft.lycoris import LokrConfig
from lora_fx.formats.peft.write import PeftLayout, as_lora, config_of

Tensors = dict[str, torch.Tensor]
ByLayer = Mapping[str, Mapping[str, torch.Tensor]]
Fields = dict[str, object]
FORM = "diffusers' format"
FACTOR = "decompose_factor"  # of a LoKr config: PEFT cannot do without


def contents(adapter: Adapter, path: Path, hints: Hints) -> tuple[Tensors, dict[str, str]]:
    """A file that diffusers' pipelines load, with its ``LoraConfig`` in the metadata.

    ``component`` says what the paths are of; without, each begins with a component's name. A
    pipeline looks for ``pytorch_lora_weights.safetensors``.
    """
    component = hints.component
    check_held(adapter, FORM, adapter.replacements, _problem)
    tensors: Tensors = {}
    fields: dict[str, object] = {}
    without = []
    rule = adapter.expects if component is not None else None
    for name, part in _parts(adapter, component).items():
        own, config = _part(name, part, rule)
        for module, leaves in own.items():
            tensors |= {f"{name}.{module}.{leaf}": tensor for leaf, tensor in leaves.items()}
        fields |= {f"{name}.{key}": value for key, value in (config or {}).items()}
        without += [name] if config is None else []
    if without and fields:
        raise AdapterError(
            f"{FORM} holds a config of all components or of none, and the LoKr of "
            f"{shorten(without)} has none; write the components to files of their own"
        )
    return tensors, {METADATA: json.dumps(fields, indent=2, sort_keys=True)} if fields else {}


def _problem(update: AnyUpdate) -> str | None:
    if _is_lokr(update):
        return None
    if is_embedding(update.stored):
        return "updates of embeddings"
    return not_lora(replace(update, bias=None) if isinstance(update, Update) else update)


def _is_lokr(update: AnyUpdate) -> bool:
    """Whether PEFT would load it as LoKr: with a config's settings, or with a scale of 1."""
    tensors, settings = update.stored_tensors, update.stored_settings
    if not update.makes_anew or not tensors:
        return False
    is_own = tensors.keys() <= LOKR and settings.get("writer") == "peft"
    return is_own and (FACTOR in settings or settings.get("scale") == 1)


def _part(
    name: str, part: Mapping[str, AnyUpdate], rule: TargetRule | None
) -> tuple[ByLayer, Fields | None]:
    """The tensors of one component as PEFT has them, and the fields of its config."""
    lokr = [module for module, update in part.items() if _is_lokr(update)]
    said = {FACTOR in part[module].stored_settings for module in lokr}
    if lokr and (len(lokr) < len(part) or len(said) > 1):
        raise AdapterError(f"{FORM} cannot hold LoKr beside others in one model, {name}")
    made: type[PeftConfig] = LokrConfig if lokr else LoraConfig
    own = part
    if not lokr:  # a product of two factors is LoRA of a module here, whatever it came from
        products = {m: u for m, u in part.items() if isinstance(u, Update)}
        modules = {
            m: u if name_of(u) is None else replace(u, stored=None) for m, u in products.items()
        }
        own = {module: as_lora(update) for module, update in modules.items()}
    if said == {False}:
        return made.tensors_of(own), None
    with within(name):
        config = config_of(PeftLayout(made, own, Adapter("part", own, expects=rule), {}, []))
    return made.tensors_of(own), dump(config)


def _parts(adapter: Adapter, component: str | None) -> dict[str, dict[str, AnyUpdate]]:
    """The updates of each component, their paths being those in the component's model."""
    expected = ", ".join(COMPONENTS)
    if component is not None:
        if component not in COMPONENTS:
            raise AdapterError(f"component is {component!r:.80}, expected one of {expected}")
        return {component: dict(adapter.updates)}
    groups: dict[str, dict[str, AnyUpdate]] = {}
    for module, update in adapter.updates.items():
        start, _, rest = module.partition(".")
        if start not in COMPONENTS or not rest:
            raise AdapterError(
                f"{module} begins with no component's name; pass component=, one of "
                f"{expected}, to say what the paths are of"
            )
        groups.setdefault(start, {})[rest] = update
    return groups
