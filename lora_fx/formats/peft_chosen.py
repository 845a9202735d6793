"""Which of PEFT's types an adapter is written as."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.adapters.source_record import is_embedding
from lora_fx.adapters.updates import Update
from lora_fx.errors import AdapterError, shorten
from lora_fx.formats.peft_lokr import with_fields
from lora_fx.formats.peft_type import PeftType
from lora_fx.formats.peft_types import LORA, TYPES
from lora_fx.formats.peft_vera import shared_by

LORA_KINDS = ("lora", "rslora", "dora")


@dataclass(frozen=True)
class Chosen:
    """An adapter divided as PEFT divides it.

    Attributes:
        type: what the layers are written as.
        layers: path -> update, all of this type.
        tokens: path -> update of a table, beside the layers.
        adapter: what they are of.
    """

    type: PeftType
    layers: Mapping[str, AnyUpdate]
    tokens: Mapping[str, AnyUpdate]
    adapter: Adapter

    @property
    def low(self) -> dict[str, Update]:
        """The layers whose update is of two factors."""
        return {p: update for p, update in self.layers.items() if isinstance(update, Update)}


def choose(adapter: Adapter) -> Chosen:
    """Finds the type that holds every update of an adapter.

    Updates of one kind are written as that kind, from the very tensors that they were read from.
    Where no type holds all of them, but all are plain products of two factors, they are written
    as LoRA of the rank that the products have.

    Raises:
        AdapterError: the kinds are mixed, or PEFT has no type for one; lists them.
    """
    if not adapter.updates:
        raise AdapterError(f"the adapter {adapter.name} has no update to write")
    tokens = {path: update for path, update in adapter.updates.items() if update.kind == "tokens"}
    layers = {path: update for path, update in adapter.updates.items() if path not in tokens}
    if not layers:
        return Chosen(TYPES["TRAINABLE_TOKENS"], _explicit(tokens), {}, adapter)
    kind = _stored_type(layers)
    if kind is not None and kind.kind == "lokr":
        cut = with_fields(layers)
        kind, layers = (kind, cut) if cut is not None else (None, layers)
    if kind is None and all(isinstance(u, Update) and _as_lora(u) for u in layers.values()):
        layers = {p: _plain(u) for p, u in layers.items() if isinstance(u, Update)}
        kind = LORA
    if kind is None:
        raise AdapterError(f"no one type of PEFT holds {_kinds(layers)}")
    if tokens and "trainable_token_indices" not in kind.own:
        raise AdapterError(
            f"PEFT has no trained tokens ({shorten(list(tokens))}) beside {kind.name}"
        )
    return Chosen(kind, layers, _explicit(tokens), adapter)


def _explicit(tokens: Mapping[str, AnyUpdate]) -> dict[str, AnyUpdate]:
    """Those that are not tied to another's: PEFT ties them itself."""
    return {p: u for p, u in tokens.items() if u.stored and "tied" not in u.stored.settings}


def _stored_type(layers: Mapping[str, AnyUpdate]) -> PeftType | None:
    """The type that all updates were stored as, or LORA where they are its own."""
    kinds = {update.kind for update in layers.values()}
    if kinds <= set(LORA_KINDS) and all(map(_is_lora, layers.values())):
        return LORA
    found = next((kind for kind in TYPES.values() if {kind.kind} == kinds), None)
    if found is None or not all(_holds(found, update) for update in layers.values()):
        return None
    if found.name == "VERA" and shared_by(layers) is None:
        return None
    return found


def _is_lora(update: AnyUpdate) -> bool:
    if isinstance(update, Update):
        return update.row is None and update.col is None
    return update.stored is not None and "parameter" in update.stored.settings


def _holds(kind: PeftType, update: AnyUpdate) -> bool:
    """Whether a type has all the tensors of an update; alpha is in its config."""
    if update.stored is None or (update.rank is not None and not update.is_plain):
        return False
    known = {*kind.leaves, "alpha", *(("vera_A", "vera_B") if kind.name == "VERA" else ())}
    return update.stored.tensors.keys() <= known


def _as_lora(update: Update) -> bool:
    return update.row is None and update.col is None


def _plain(update: Update) -> Update:
    """As LoRA: what the file of another kind held no longer matters."""
    if update.kind in LORA_KINDS:
        return update
    return replace(update, kind="lora" if update.magnitude is None else "dora", stored=None)


def _kinds(layers: Mapping[str, AnyUpdate]) -> str:
    by_kind: dict[str, list[str]] = {}
    for path, update in layers.items():
        by_kind.setdefault(update.kind, []).append(path)
    return "; ".join(f"{kind}: {shorten(paths, 3)}" for kind, paths in sorted(by_kind.items()))


def check_expressible(chosen: Chosen) -> None:
    """Refuses what PEFT would not load, or not as it is meant.

    Raises:
        AdapterError: names the target and the layers.
    """
    adapter = chosen.adapter
    low = chosen.low
    loud = [path for path, update in low.items() if not math.isfinite(update.scale)]
    reserved = [p for p in adapter.updates if {"base_layer", "token_adapter"} & set(p.split("."))]
    rootless = [name for name in adapter.replacements if "." not in name]
    problems = {
        "scales that are no finite number": loud,
        "PEFT keeps these names for itself": reserved,
        "PEFT cannot replace a parameter of the model itself, only of a module in it": rootless,
    }
    if chosen.type is LORA:
        problems |= _lora_problems(chosen.layers, low)
    for problem, paths in problems.items():
        if paths:
            raise AdapterError(f"{problem}: {shorten(paths)}")


def _lora_problems(
    layers: Mapping[str, AnyUpdate], low: Mapping[str, Update]
) -> dict[str, list[str]]:
    without = [path for path, update in low.items() if update.magnitude is None]
    biased = [path for path, update in low.items() if update.bias is not None]
    tables = [path for path, update in low.items() if is_table(update)]
    named = [p for p, u in layers.items() if u.stored and "parameter" in u.stored.settings]
    is_dora = len(without) < len(low)
    return {
        "of rank 0, which PEFT does not load": [p for p, u in low.items() if u.rank == 0],
        "PEFT's use_dora is for all layers, but these have no magnitude": without * is_dora,
        "PEFT has no lora_bias beside DoRA": biased * is_dora,
        "PEFT has no lora_bias of embeddings": tables * bool(biased),
        "PEFT has no DoRA or lora_bias of parameters": named * (is_dora or bool(biased)),
    }


def is_table(update: AnyUpdate) -> bool:
    """Whether an update says that it is of an embedding."""
    return is_embedding(update.stored)
