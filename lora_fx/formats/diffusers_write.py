"""An adapter as the tensors and the metadata of a diffusers file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import torch

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.adapters.source_record import is_embedding
from lora_fx.adapters.target_rule import TargetRule
from lora_fx.adapters.updates import Update
from lora_fx.errors import AdapterError, shorten
from lora_fx.formats.diffusers_keys import COMPONENTS, LOKR
from lora_fx.formats.pairs import magnitude_beside, up_beside
from lora_fx.formats.peft_chosen import LORA_KINDS, Chosen
from lora_fx.formats.peft_describe import describe, describe_chosen
from lora_fx.formats.peft_file import METADATA
from lora_fx.formats.peft_paths import homes_of
from lora_fx.formats.peft_types import TYPES
from lora_fx.formats.unheld import check_held, not_lora

Tensors = dict[str, torch.Tensor]
FORM = "diffusers' format"
FACTOR = "decompose_factor"  # of a LoKr config: PEFT cannot do without


def contents(adapter: Adapter, component: str | None) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a file and its metadata.

    Args:
        adapter: what to write.
        component: what the paths are of; None where each begins with a component's name.

    Raises:
        AdapterError: the format cannot hold the adapter.
    """
    check_held(adapter, FORM, adapter.replacements, _problem)
    tensors: Tensors = {}
    fields: dict[str, object] = {}
    without = []
    rule = adapter.expects if component is not None else None
    for name, part in _parts(adapter, component).items():
        own, config = _part(name, part, rule)
        tensors |= {f"{name}.{key}": tensor for key, tensor in own.items()}
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
    stored = update.stored
    if stored is None or not update.makes_anew or not stored.tensors:
        return False
    is_own = stored.tensors.keys() <= LOKR and stored.settings.get("writer") == "peft"
    return is_own and (FACTOR in stored.settings or stored.settings.get("scale") == 1)


def _part(
    name: str, part: Mapping[str, AnyUpdate], rule: TargetRule | None
) -> tuple[Tensors, dict[str, object] | None]:
    """The tensors of one component by key, and the fields of its config."""
    lokr = [module for module, update in part.items() if _is_lokr(update)]
    if not lokr:
        return _lora(name, {m: u for m, u in part.items() if isinstance(u, Update)}, rule)
    said = {FACTOR in u.stored.settings for u in part.values() if u.stored}
    if len(lokr) < len(part) or len(said) > 1:
        raise AdapterError(f"{FORM} cannot hold LoKr beside others in one model, {name}")
    stored = {module: update.stored for module, update in part.items() if update.stored}
    tensors = {f"{m}.{leaf}": t for m, own in stored.items() for leaf, t in own.tensors.items()}
    if said == {False}:
        return tensors, None
    chosen = Chosen(TYPES["LOKR"], part, {}, Adapter("part", part, expects=rule))
    return tensors, describe_chosen(chosen, homes_of(part), [])


def _lora(
    name: str, part: Mapping[str, Update], rule: TargetRule | None
) -> tuple[Tensors, dict[str, object]]:
    is_biased = any(update.bias is not None for update in part.values())
    is_dora = [update.magnitude is not None for update in part.values()]
    if any(is_dora) and (is_biased or not all(is_dora)):
        mixed = "biases of up-projections (lora_bias)" if is_biased else "plain LoRA"
        raise AdapterError(f"{FORM} cannot hold DoRA beside {mixed} in one model, {name}")
    tensors: Tensors = {}
    for module, update in part.items():
        tensors[f"{module}.lora_A.weight"] = update.down
        tensors[f"{module}.lora_B.weight"] = up_beside(update.down, update.up)
        if is_biased:
            zero = update.up.new_zeros(update.up.shape[0])
            tensors[f"{module}.lora_B.bias"] = zero if update.bias is None else update.bias
        if update.magnitude is not None:
            tensors[f"{module}.lora_magnitude_vector"] = magnitude_beside(
                update.down, update.magnitude
            )
    # A product of two factors is LoRA here, whatever it came from.
    plain = {m: u if u.kind in LORA_KINDS else replace(u, kind="lora") for m, u in part.items()}
    return tensors, describe(Adapter("part", plain, expects=rule), [])


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
