"""The paths of an adapter as the graph calls them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

from lora_fx.adapter import Adapter, AnyUpdate, WeightUpdate
from lora_fx.errors import AdapterError, shorten
from lora_fx.fitted import fitted
from lora_fx.sites import Site, readers
from lora_fx.trace import example_of

Groups = Mapping[str, list[Site]]


def resolved(gm: fx.GraphModule, adapter: Adapter, groups: Groups) -> Adapter:
    """An adapter whose paths are those of the graph's layers, where they mean one of those.

    A module that has several names is called by some of them in a graph, and a file may name a
    parameter where the graph has the layer that reads it.

    Raises:
        AdapterError: rows are trained of a table that another layer shares, which the file leaves
            open.
    """
    example = example_of(gm)
    aliases = example.aliases if example else {}
    updates: dict[str, AnyUpdate] = {}
    matched = {_address(u) for path, u in adapter.updates.items() if path in groups}
    for path, update in adapter.updates.items():
        named = [name for name in (path, *aliases.get(path, ())) if name in groups]
        meant = named or _stored_at(path, update, groups) or _parameter(gm, path, update)
        if not meant and update.kind == "tokens" and _address(update) in matched:
            continue  # a table that is never called itself: those who share it have the rows
        updates |= dict.fromkeys(meant or [path], update)
    _check_shared_tokens(adapter.name, updates, groups)
    return replace(adapter, updates=updates)


def _address(update: AnyUpdate) -> int:
    """Where what a file held of an update is: the same if it is given for several modules."""
    held = update.stored.tensors.values() if update.stored else ()
    first: torch.Tensor = next(iter((*held, *update.tensors())))
    return int(first.data_ptr())


def _stored_at(path: str, update: AnyUpdate, groups: Groups) -> list[str]:
    """The layers whose weight is stored under a path, or below it, and that the update fits."""
    stored = (path, f"{path}.weight")
    found = {p: calls[0] for p, calls in groups.items() if calls[0].weight.target in stored}
    fitting = {p: site for p, site in found.items() if _fits(update, site)}
    kinds = {site.kind for site in fitting.values()}
    return list(fitting) if len(kinds) == 1 else []


def _parameter(gm: fx.GraphModule, path: str, update: AnyUpdate) -> list[str]:
    """The parameter of a module that is no layer of the graph, such as one that holds experts."""
    weight = f"{path}.weight"
    is_meant = isinstance(update, WeightUpdate) and next(readers(gm, path), None) is None
    return [weight] if is_meant and next(readers(gm, weight), None) is not None else []


def _fits(update: AnyUpdate, site: Site) -> bool:
    try:
        fitted("", update, site)
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
