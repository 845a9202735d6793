"""Renames an adapter's layers to those of a base, and cuts or joins updates of packed ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.row_blocks import Block, cut, joined, swapped
from lora_fx.adapters.source_record import TOLD_BY_BASE, is_embedding
from lora_fx.adapters.updates import AnyUpdate, with_settings
from lora_fx.errors import AdapterError, shorten, within
from lora_fx.layers.base_layers import BaseLayers
from lora_fx.layers.meanings import Meaning, Meanings
from lora_fx.layers.moves import RENAMED
from lora_fx.layers.resolve import Names, check_one


def settled(
    adapter: Adapter,
    base: BaseLayers,
    known: Collection[str],
    more: Callable[[BaseLayers], Meanings] = lambda base: {},
    furthest: int = RENAMED,
) -> Adapter:
    """The adapter by the paths that a base has for its layers.

    A path that the base has is meant as it is, one of no layer stays as it is: what binds the
    adapter refuses it.

    Args:
        adapter: by the paths of its file.
        base: its layers.
        known: of its updates and replaced tensors those that the base has.
        more: names that a format has for parts of a base.
        furthest: how far a path may be moved.

    Returns:
        The adapter, and what was exchanged in its paths as ``moved``. Its config speaks of the
        paths of another model then, so that what it expects is not asked.

    Raises:
        AdapterError: a path may mean several layers, two mean one, or what an update is made for
            has another size.
    """
    updates, values = adapter.updates, adapter.replacements
    asked = {
        **{n: tuple(t.shape) for n, t in values.items()},
        **{p: u.shape for p, u in updates.items()},
    }
    if asked.keys() <= set(known):
        return replace(adapter, moved=adapter.moved or {})
    names = Names.of(base, more(base))
    found = names.resolve({n: () if n in known else s for n, s in asked.items()}, furthest)
    with within(f"adapter {adapter.name}"):
        check_one(found.several)
    meant = {name: path for name, path in found.found.items() if name not in known}
    if not meant:
        return replace(adapter, moved=adapter.moved or {})
    with within(f"adapter {adapter.name}"):
        kept = {name: u for name, u in updates.items() if name not in meant}
        own = {name: u for name, u in updates.items() if name in meant}
        placed = place(own, {name: names.meanings[meant[name]] for name in own}, base)
        _check_apart(kept, placed, meant)
    replaced = {meant.get(name, name): value for name, value in values.items()}
    moved = {**(adapter.moved or {}), **found.moved}
    expects = adapter.expects if not found.moved else None
    return replace(
        adapter, updates={**kept, **placed}, replacements=replaced, expects=expects, moved=moved
    )


def told_of_tables(adapter: Adapter, base: BaseLayers) -> Adapter:
    """The adapter, its updates of a base's embeddings known as that: few formats' files tell."""
    others = {p: u for p, u in adapter.updates.items() if p in base and base[p].is_table}
    tables = {
        path: with_settings(update, **TOLD_BY_BASE.settings)
        for path, update in others.items()
        if update.kind != "tokens" and not is_embedding(update.stored)
    }
    return replace(adapter, updates={**adapter.updates, **tables}) if tables else adapter


def inside(adapter: Adapter, prefix: str) -> Adapter:
    """The adapter of a module, as one of the model that holds it.

    Args:
        adapter: by the paths of the module, as its file has them.
        prefix: the module's path in the model.

    Raises:
        AdapterError: the prefix is no path, or the adapter's paths are those of the model already.
    """
    if not all(part.isidentifier() or part.isdecimal() for part in prefix.split(".")):
        raise AdapterError(
            f"prefix {prefix!r:.80}: expected the path of a module in the model, such as m or "
            "encoder.0"
        )
    if adapter.moved is not None:
        raise AdapterError(
            f"prefix {prefix!r:.80}: a format like this one finds its layers in the base by "
            "itself; leave prefix out"
        )
    return replace(
        adapter,
        updates={f"{prefix}.{path}": update for path, update in adapter.updates.items()},
        replacements={f"{prefix}.{name}": value for name, value in adapter.replacements.items()},
        expects=None,  # it speaks of the module's own paths
        moved={"": prefix},
    )


def place(
    updates: Mapping[str, AnyUpdate], meant: Mapping[str, Meaning], base: BaseLayers
) -> dict[str, AnyUpdate]:
    """The updates of a base's own layers, out of those of what has their rows.

    Args:
        updates: by name.
        meant: name -> whose rows it has.
        base: its layers.

    Raises:
        AdapterError: two are of the same rows, or one has another size than its rows.
    """
    whole: dict[str, AnyUpdate] = {}
    owners: dict[str, str] = {}
    parts: dict[str, list[tuple[str, Block]]] = defaultdict(list)
    for name, update in updates.items():
        meaning = meant[name]
        path = meaning.layers[0]
        with within(name):
            if not meaning.is_all:
                parts[path].append((name, _block(update, meaning, base)))
                continue
            several = divided(update, meaning.layers, base)
            several = {path: swapped(update)} if meaning.halves_swapped else several
        for layer, part in several.items():
            if owners.setdefault(layer, name) != name:
                raise AdapterError(f"{owners[layer]} and {name} are both of {layer}")
            whole[layer] = part
    for path, blocks in parts.items():
        _check_rows(path, blocks, whole)
        with within(path):
            shape = Meaning((path,)).shape(base)
            whole[path] = joined([block for _, block in blocks], tuple(n or 0 for n in shape))
    return whole


def _block(update: AnyUpdate, meaning: Meaning, base: BaseLayers) -> Block:
    """An update of some rows of a layer."""
    size = update.shape[0]
    if size is None:
        raise AdapterError(
            f"an update of kind {update.kind!r} is of a part of {meaning.layers[0]} and does not "
            "tell how many rows it has: merge it where it was made"
        )
    return Block(update, meaning.rows(base, size), meaning.expert)


def divided(update: AnyUpdate, layers: tuple[str, ...], base: BaseLayers) -> dict[str, AnyUpdate]:
    """The update of each of several layers that have the rows of one."""
    if len(layers) == 1:
        return {layers[0]: update}
    sizes = [base[path].own_shape[0] for path in layers]
    if update.shape[0] not in (None, sum(sizes)):
        raise AdapterError(
            f"made for {update.shape[0]} rows, {', '.join(layers)} have {sum(sizes)} together"
        )
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    return {
        path: cut(update, range(end - size, end))
        for path, size, end in zip(layers, sizes, ends, strict=True)
    }


def _check_rows(path: str, blocks: list[tuple[str, Block]], whole: Mapping[str, AnyUpdate]) -> None:
    """Refuses two updates of the same rows."""
    if path in whole:
        raise AdapterError(f"{blocks[0][0]} and another update are both of {path}")
    seen: dict[tuple[int | None, int], str] = {}
    for name, block in blocks:
        for row in block.at:
            other = seen.setdefault((block.expert, row), name)
            if other != name or row < 0:
                raise AdapterError(
                    f"{other} and {name} would both be of row {row} of {path}: their sizes do not "
                    "add up to its own. Use the base that the adapter was trained on"
                )


def _check_apart(
    kept: Mapping[str, AnyUpdate], placed: Mapping[str, AnyUpdate], meant: Mapping[str, str]
) -> None:
    both = [path for path in placed if path in kept]
    if both:
        names = [name for name, path in meant.items() if path in both]
        raise AdapterError(f"{shorten(both)} and {shorten(names)} are the same layers")
