"""An adapter as PEFT's config and tensors, of which PEFT makes the same updates."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.adapters.safe_regex import MAX_LENGTH
from lora_fx.adapters.source_record import kept
from lora_fx.adapters.target_rule import saved_module
from lora_fx.adapters.updates import Update
from lora_fx.errors import AdapterError, shorten
from lora_fx.formats.peft.config import PeftConfig, low_rank
from lora_fx.formats.peft.fields import Fields, dump
from lora_fx.formats.peft.keys import PREFIX, TOKEN_BASE, TOKENS
from lora_fx.formats.peft.lora import LoraConfig
from lora_fx.formats.peft.types import LEAF, TYPES, TokensConfig
from lora_fx.formats.peft.wrappers import WRAPPED, Home, homes_of
from lora_fx.kinds import lora

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PeftLayout:
    """An adapter divided as PEFT divides it.

    Attributes:
        type: what the layers are written as.
        layers: path -> update, all of this type.
        adapter: what they are of.
        tokens: path -> update of a table, beside the layers.
        saved: paths of the modules stored whole.
    """

    type: type[PeftConfig]
    layers: Mapping[str, AnyUpdate]
    adapter: Adapter
    tokens: Mapping[str, AnyUpdate]
    saved: list[str]

    @cached_property
    def homes(self) -> dict[str, Home]:
        """Where its updates are kept in a file."""
        return homes_of(self.layers)


def contents(adapter: Adapter) -> tuple[dict[str, object], Tensors]:
    """The fields of PEFT's config and the tensors by PEFT's keys."""
    chosen = choose(adapter)
    _check_expressible(chosen)
    return dump(config_of(chosen)), {**_adapter_tensors(chosen), **_base_tensors(chosen)}


def choose(adapter: Adapter) -> PeftLayout:
    """Finds the type that holds every update of an adapter.

    Updates of one kind are written as that kind, from the very tensors that they were read from.
    Where no type holds all of them, but all are plain products of two factors, they are written
    as LoRA of the rank that the products have.
    """
    tokens = {path: update for path, update in adapter.updates.items() if update.kind == "tokens"}
    # Those that are tied to another's PEFT ties itself.
    explicit = {p: u for p, u in tokens.items() if "tied" not in u.stored_settings}
    layers = {path: update for path, update in adapter.updates.items() if path not in tokens}
    saved = _saved_modules(adapter)
    if not layers:
        return PeftLayout(TokensConfig, explicit, adapter, {}, saved)
    found = ((made, made.adopted(layers)) for made in TYPES.values())
    made, held = next(((made, held) for made, held in found if held is not None), (None, None))
    if held is None and all(map(LoraConfig.holds, layers.values())):
        made, held = LoraConfig, {path: as_lora(update) for path, update in layers.items()}
    if made is None or held is None:
        raise AdapterError(f"no one type of PEFT holds {_kinds(layers)}")
    held = lora.as_peft_stores(held) if made is LoraConfig else held
    if tokens and not made.has("trainable_token_indices"):
        raise AdapterError(
            f"PEFT has no trained tokens ({shorten(list(tokens))}) beside {made.peft_type}"
        )
    return PeftLayout(made, held, adapter, explicit, saved)


def as_lora(update: AnyUpdate) -> AnyUpdate:
    """As LoRA: what the file of another kind held no longer matters."""
    if not isinstance(update, Update) or update.kind in LoraConfig.kinds:
        return update
    kind = "lora" if update.magnitude is None else "dora"
    return replace(update, kind=kind, stored=kept(update.stored))


def _kinds(layers: Mapping[str, AnyUpdate]) -> str:
    kinds = sorted({update.kind for update in layers.values()})
    by_kind = {kind: [path for path, u in layers.items() if u.kind == kind] for kind in kinds}
    return "; ".join(f"{kind}: {shorten(paths, 3)}" for kind, paths in by_kind.items())


def _beside(adapter: Adapter) -> list[str]:
    """The replaced tensors, but the weights of layers that the adapter updates as well."""
    own = {f"{path}.weight" for path in adapter.updates}
    return [name for name in adapter.replacements if name not in own]


def _saved_modules(adapter: Adapter) -> list[str]:
    """Modules to store whole: the outermost that own a replaced tensor other than a lone bias."""
    names = [name for name in _beside(adapter) if not name.endswith(".bias")]
    owners = {name.rpartition(".")[0] for name in names}
    return sorted(m for m in owners if not any(m.startswith(f"{other}.") for other in owners))


def _check_expressible(chosen: PeftLayout) -> None:
    """Refuses what PEFT would not load, or not as it is meant."""
    adapter, saved = chosen.adapter, chosen.saved
    low, wrappers = low_rank(chosen.layers), {"base_layer", "token_adapter"}
    problems = {
        "scales that are no finite number": [
            path for path, update in low.items() if not math.isfinite(update.scale)
        ],
        "PEFT keeps these names for itself": [
            path for path in adapter.updates if wrappers & set(path.split("."))
        ],
        "PEFT cannot replace a parameter of the model itself, only of a module in it": [
            name for name in adapter.replacements if "." not in name
        ],
        f"PEFT cannot both adapt and replace a module, here {shorten(saved)}": [
            path for path in adapter.updates if saved_module(path, saved)
        ],
    }
    _refuse(problems)


def _refuse(problems: Mapping[str, list[str]]) -> None:
    for problem, paths in problems.items():
        if paths:
            raise AdapterError(f"{problem}: {shorten(paths)}")


def config_of(chosen: PeftLayout) -> PeftConfig:
    """The config of which PEFT makes the same ranks, scales and targets.

    Raises:
        AdapterError: PEFT would not load it, or no one config says it of all layers.
    """
    _refuse(chosen.type.problems(chosen.layers))
    fields = chosen.type.described(chosen.layers)
    fields |= _targets(chosen) | {"bias": _bias(chosen), "modules_to_save": tuple(chosen.saved)}
    fields["trainable_token_indices"] = {
        path: tuple(update.stored_settings["indices"]) for path, update in chosen.tokens.items()
    } or None
    lacking = [name for name in chosen.type.lacks if fields.get(name) not in (None, (), "none")]
    if lacking:
        raise AdapterError(f"PEFT's {chosen.type.peft_type} has no {', '.join(lacking)}")
    return chosen.type(**{n: v for n, v in fields.items() if chosen.type.has(n)})


def _targets(chosen: PeftLayout) -> Fields:
    """The adapter's own rule where it says more than its paths do, else the paths."""
    rule, homes = chosen.adapter.expects, chosen.homes
    paths = [p for p in chosen.layers if homes[p].asked and homes[p].parameter is None]
    # PEFT wraps the heads that are tied to a table, and fails on both names.
    paths = [p for p in paths if not chosen.layers[p].stored_settings.get("head")] or paths
    exact: Fields = {"target_modules": _exact_targets(sorted(paths))}
    if rule is None or rule.is_all_linear or not all(map(rule.matches, paths)):
        return exact
    kept = {
        "exclude_modules": rule.exclude_modules or None,
        "layers_to_transform": rule.layers_to_transform,
        "layers_pattern": rule.layers_pattern or None,
    }
    has_place = all(chosen.type.has(name) for name, value in kept.items() if value is not None)
    if not has_place or not chosen.type.keeps_rule:
        return exact
    targets = rule.target_modules
    return {**kept, "target_modules": targets if isinstance(targets, str) else list(targets)}


def _exact_targets(paths: list[str]) -> str | list[str]:
    """The paths as a list, which most programs read, or as a regex where a list means too much.

    In a list ``fc`` means ``block.fc`` too, so a layer at the root asks for a regex, if it fits.
    """
    regex = "|".join(re.escape(path) for path in paths)
    at_root = any("." not in path for path in paths)
    return regex if at_root and len(regex) <= MAX_LENGTH else paths


def _bias(chosen: PeftLayout) -> str:
    """The narrowest mode that holds every lone bias."""
    only = chosen.type.only_bias
    modules = [name.rpartition(".")[0] for name in _beside(chosen.adapter)]
    alone = [m for m in modules if not saved_module(m, chosen.saved)]
    if alone and not only:
        raise AdapterError(f"PEFT's {chosen.type.peft_type} holds no biases: {shorten(alone)}")
    if not alone:
        return "none"
    return only if all(module in chosen.layers for module in alone) else "all"


def _adapter_tensors(chosen: PeftLayout) -> Tensors:
    """The tensors of the updates under PEFT's keys."""
    homes, layers = chosen.homes, chosen.type.tensors_of(chosen.layers)
    tensors = chosen.type.shared_of(chosen.layers)
    for path, own in layers.items():
        tensors |= {f"{PREFIX}{homes[path].key}.{leaf}": tensor for leaf, tensor in own.items()}
    for path, update in chosen.tokens.items():
        tensors[PREFIX + path + TOKENS] = update.stored_tensors[LEAF]
    return tensors


def _base_tensors(chosen: PeftLayout) -> Tensors:
    """The replaced tensors: of a wrapped module inside of its wrapper."""
    tensors: Tensors = {}
    for name, tensor in chosen.adapter.replacements.items():
        module, _, leaf = name.rpartition(".")
        key = name
        if module in chosen.tokens:
            key = f"{module}{TOKEN_BASE}{leaf}"
        elif module in chosen.homes:
            key = f"{chosen.homes[module].key}{WRAPPED}.{leaf}"
        tensors[PREFIX + key] = tensor
    return tensors
