"""Module paths of an adapter, translated to those of the graph: aliases, wrappers, ties."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from lora_fx.adapters.adapter import Adapter, AnyUpdate
from lora_fx.errors import AdapterError, shorten
from lora_fx.graph.example import example_of
from lora_fx.injection.conform import fitted
from lora_fx.layers.sites import Site, readers

Groups = Mapping[str, list[Site]]


def resolved(gm: fx.GraphModule, adapter: Adapter, groups: Groups) -> Adapter:
    """An adapter whose paths are those of the graph's layers, where they mean one of those.

    A module that has several names is called by some of them in a graph, and a file may name a
    parameter where the graph has the layer that reads it.

    Raises:
        AdapterError: two paths mean one layer, with updates that differ; or rows are trained of a
            table that another layer shares, which the file leaves open.
    """
    updates: dict[str, AnyUpdate] = {}
    given: dict[str, str] = {}
    for path, meant in meanings(gm, adapter, groups).items():
        update = adapter.updates[path]
        for name in meant:
            if name in given and not _are_same(update, updates[name]):
                raise AdapterError(
                    f"adapter {adapter.name}: {given[name]} and {path} are one layer of the model "
                    f"({name}), and the two updates differ: leave out the one that is not meant"
                )
            given[name], updates[name] = path, update
    _check_shared_tokens(adapter.name, updates, groups)
    return replace(adapter, updates=updates, replacements=_replacements(gm, adapter))


def meanings(gm: fx.GraphModule, adapter: Adapter, groups: Groups) -> dict[str, list[str]]:
    """What each path of an adapter is called in the graph: itself, where nothing is known of it."""
    others = aliases(gm)
    found: dict[str, list[str]] = {}
    matched = {_address(u) for path, u in adapter.updates.items() if path in groups}
    for path, update in adapter.updates.items():
        named = [name for name in (path, *others.get(path, ())) if name in groups]
        meant = named or _stored_at(path, update, groups) or _parameter(gm, path, update)
        # A table that is never called itself: those who share it have the rows.
        is_shared = not meant and update.kind == "tokens" and _address(update) in matched
        found[path] = [] if is_shared else meant or [path]
    return found


def aliases(gm: fx.GraphModule) -> Mapping[str, Sequence[str]]:
    """Path of a module that has several names -> its other names."""
    example = example_of(gm)
    return example.aliases if example else {}


def _replacements(gm: fx.GraphModule, adapter: Adapter) -> dict[str, torch.Tensor]:
    """The replaced tensors by the names that the graph has for them."""
    others = aliases(gm)
    found: dict[str, torch.Tensor] = {}
    given: dict[str, str] = {}
    for name, value in adapter.replacements.items():
        module, dot, leaf = name.rpartition(".")
        several = (name, *(f"{path}{dot}{leaf}" for path in others.get(module, ())))
        called = [n for n in several if len(several) > 1 and next(readers(gm, n), None) is not None]
        for known in called or [name]:
            if known in given and not _are_equal(value, found[known]):
                raise AdapterError(
                    f"adapter {adapter.name}: {given[known]} and {name} are one parameter of the "
                    "model, and the two values differ: leave out the one that is not meant"
                )
            given[known], found[known] = name, value
    return found


def _are_same(one: AnyUpdate, other: AnyUpdate) -> bool:
    """Whether two updates, of two names of one module, hold the same numbers."""
    pairs = zip(one.tensors(), other.tensors(), strict=False)
    scales = (getattr(one, "scale", None), getattr(other, "scale", None))
    counts = len(list(one.tensors())), len(list(other.tensors()))
    same = one.kind == other.kind and counts[0] == counts[1] and scales[0] == scales[1]
    return one is other or (same and all(_are_equal(a, b) for a, b in pairs))


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or (one.shape == other.shape and torch.equal(one, other))


def _address(update: AnyUpdate) -> int:
    """Where what a file held of an update is: the same if it is given for several modules."""
    held = update.stored.tensors.values() if update.stored else ()
    first: torch.Tensor = next(iter((*held, *update.tensors())))
    return int(first.data_ptr())


def _stored_at(path: str, update: AnyUpdate, groups: Groups) -> list[str]:
    """The layers whose weight is stored under a path, or below it, and that the update fits."""
    stored = (path, f"{path}.weight")
    found = {p: calls[0] for p, calls in groups.items() if calls[0].weight.target in stored}
    own = [p for p, calls in groups.items() if calls[0].bare and p.rpartition(".")[0] == path]
    if not found and len(own) == 1:  # a module that holds one matrix, whatever it calls it
        found = {own[0]: groups[own[0]][0]}
    fitting = {p: site for p, site in found.items() if _fits(update, site)}
    kinds = {site.kind for site in fitting.values()}
    return list(fitting) if len(kinds) == 1 else []


def _parameter(gm: fx.GraphModule, path: str, update: AnyUpdate) -> list[str]:
    """The parameter of a module that is no layer of the graph, such as one that holds experts."""
    weight = f"{path}.weight"
    is_meant = update.makes_anew and next(readers(gm, path), None) is None
    return [weight] if is_meant and next(readers(gm, weight), None) is not None else []


def _fits(update: AnyUpdate, site: Site) -> bool:
    try:
        fitted(update, site)
    except AdapterError:
        return False
    return True


def _check_shared_tokens(name: str, updates: Mapping[str, AnyUpdate], groups: Groups) -> None:
    """Refuses rows of a shared table that are not said of all who share it.

    PEFT stores them once, and gives a tied head the same rows without a word in the file.
    """
    tables = {p for p, update in updates.items() if update.kind == "tokens" and p in groups}
    weights = {groups[path][0].weight.target for path in tables}
    sharing = [
        path
        for path, calls in groups.items()
        if calls[0].weight.target in weights and path not in updates
    ]
    if sharing:
        raise AdapterError(
            f"adapter {name}: trained tokens of {shorten(sorted(tables))}, whose table "
            f"{shorten(sharing)} shares: the file does not say whether the rows are meant there "
            "too; load it with base=, the model"
        )
