"""Notes where each update of an adapter went, and that none was lost or used twice."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import fx

from lora_fx.adapters.adapter import Adapter, AnyUpdate
from lora_fx.errors import AdapterError, shorten
from lora_fx.injection.bind import Binding
from lora_fx.injection.injected_adapters import Bound, Held, Injected, add, value_part
from lora_fx.injection.stacking import adapters_at
from lora_fx.layers.adapter_tensors import parameter_names, value_names
from lora_fx.layers.sites import Site

Groups = Mapping[str, Sequence[Site]]
Beside = Mapping[str, frozenset[str]]


def standing(calls: Sequence[Site]) -> frozenset[str]:
    """Names of the adapters that stand at a layer."""
    return frozenset(adapters_at(calls[0]))


def weight_name(site: Site) -> str:
    """What the weight of a layer is called by the layer's own path."""
    leaf = str(site.weight.target).rpartition(".")[2]
    return site.path if site.bare else f"{site.path}.{leaf}"


def note_binding(
    gm: fx.GraphModule,
    binding: Binding,
    groups: Groups,
    beside: Beside,
    skipped: Collection[str],
    before: Mapping[str, Held],
) -> None:
    """Makes a graph remember an adapter that has just been put into it.

    Args:
        gm: the graph.
        binding: of the adapter to the graph's layers.
        groups: the calls of the layers.
        beside: which adapters stood at each layer already.
        skipped: replaced tensors that were left out.
        before: what stood in the place of those that were replaced, by name.

    Raises:
        AdapterError: an update has not come into the graph.
    """
    given = binding.adapter
    bound = {
        path: tuple(
            _bound(gm, given.name, name, binding.updates[name], groups, beside) for name in names
        )
        for path, names in binding.meant.items()
    }
    lost = [
        path
        for path, several in bound.items()
        if any(any(True for _ in given.updates[path].tensors()) and not b.names for b in several)
    ]
    if lost:
        raise AdapterError(
            f"adapter {given.name}: the updates of {shorten(lost)} have not come into the graph; "
            "please report the model"
        )
    kept = {path: given.updates[path] for path in bound}
    replaced = {n: t for n, t in given.replacements.items() if n not in skipped}
    known = replace(given, updates=kept, replacements=replaced)
    add(gm, Injected(known, tensors_of(given), False, bound, before=before))


def note_fresh(gm: fx.GraphModule, adapter: Adapter, groups: Groups, beside: Beside) -> None:
    """Makes a graph remember an adapter that trains, whose values are the graph's alone."""
    bound = {
        path: (_bound(gm, adapter.name, path, update, groups, beside, update.scale),)  # type: ignore[attr-defined]
        for path, update in adapter.updates.items()
    }
    add(gm, Injected(adapter, tensors_of(adapter), True, bound))


def tensors_of(adapter: Adapter) -> int:
    """How many tensors an adapter holds, one that several updates share once."""
    held = (t for update in adapter.updates.values() for t in held_by(update))
    return len({id(tensor) for tensor in (*held, *adapter.replacements.values())})


def held_by(update: AnyUpdate) -> list[object]:
    """The tensors of an update as its file has them."""
    stored = list(update.stored.tensors.values()) if update.stored else []
    return [*stored] or [*update.tensors()]


def _bound(
    gm: fx.GraphModule,
    adapter: str,
    path: str,
    update: AnyUpdate,
    groups: Groups,
    beside: Beside,
    scale: float = 1.0,
) -> Bound:
    site = groups[path][0] if path in groups else None
    bare = site is None or site.bare
    parts = parameter_names(path, adapter, bare)._asdict()
    # A dense update of a grouped convolution is one value, however many tensors it was given as.
    count = len(update.values) or 1
    values = value_names(path, adapter, count, bare)
    names = {**parts, **{value_part(place): name for place, name in enumerate(values)}}
    layer = None if site is None else site.layer
    return Bound.of(gm, layer, names, scale, beside.get(path, frozenset()))
