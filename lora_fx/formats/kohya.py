"""kohya's files: ``lora_unet_<path>.lora_down.weight``, ``.lora_up.weight`` and ``.alpha``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from lora_fx.adapter import Adapter, Update
from lora_fx.errors import AdapterError, shorten
from lora_fx.formats.alphas import alpha_for
from lora_fx.formats.base_layers import layers_of
from lora_fx.formats.hints import Hints
from lora_fx.formats.kohya_names import HOLDERS, PREFIXES, check_part, flat, part_of, resolve
from lora_fx.formats.limits import check_matrices_only, refuse_foreign
from lora_fx.formats.pairs import (
    ALPHA,
    DOWN,
    UP,
    Layers,
    Roles,
    add,
    check_pairs,
    rank_of,
    scalar_of,
)
from lora_fx.formats.tensor_file import read_file, write_file

ROLES = {"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": ALPHA}


def is_kohya(path: Path, names: Collection[str]) -> bool:
    """Whether a file's tensors are named as kohya's, or as LyCORIS's."""
    return any(part_of(name) or name.startswith("lycoris_") for name in names)


def read_kohya(path: Path, name: str, hints: Hints) -> Adapter:
    """Reads a file of kohya's: every key is used, or refused by name.

    The scale is alpha over the rank; an alpha that is missing or 0 means the rank, as in sd-scripts
    (``networks/lora.py``).

    Args:
        path: the file.
        name: of the adapter.
        hints: ``base`` is needed, for the names are lossy; ``component`` reads one part of a
            pipeline (unet, te, te1, te2, te3) and leaves the others out.

    Raises:
        AdapterError: names the file, the tensor, and what is wrong with it.
    """
    if hints.base is None:
        raise AdapterError(
            f"{path}: kohya's names lose the dots of a path; pass base=, the model or the traced "
            "graph that the adapter is for"
        )
    layers = _sorted(path, read_file(path, hints), hints.component)
    paths = resolve(path, layers, layers_of(hints.base))
    return Adapter(name, {paths[key]: _update(path, roles) for key, roles in layers.items()})


def write_kohya(adapter: Adapter, path: Path, hints: Hints, force: bool) -> None:
    """Writes a file that kohya's scripts, and what reads theirs, load.

    rsLoRA becomes the alpha that gives its scale over the rank. An alpha that float32 cannot hold
    is written as float64.

    Args:
        adapter: what to write.
        path: ends in ``.safetensors``.
        hints: ``component`` says what the paths are of; without, each begins with a part's name
            in a pipeline, such as ``unet.``.
        force: replace a file that is there.

    Raises:
        AdapterError: the target exists, two paths would get one name, or the format cannot hold
            the adapter.
    """
    check_matrices_only(adapter, path, "kohya's format", adapter.replacements)
    without = [p for p, update in adapter.updates.items() if update.scale == 0]
    if without:
        raise AdapterError(
            f"{path}: kohya's format cannot hold a scale of 0, which it reads as 1: "
            f"{shorten(without)}; leave them out"
        )
    owners: dict[str, str] = {}
    tensors = {}
    for module, update in adapter.updates.items():
        name = _name(path, module, adapter.updates, hints.component)
        if owners.setdefault(name, module) != module:
            raise AdapterError(f"{path}: {owners[name]} and {module} would both be called {name}")
        tensors[f"{name}.lora_down.weight"] = update.down
        tensors[f"{name}.lora_up.weight"] = update.up
        tensors[f"{name}.alpha"] = _as_tensor(alpha_for(update.scale, update.rank))
    write_file(path, tensors, {}, force)


def _sorted(file: Path, tensors: Mapping[str, torch.Tensor], component: str | None) -> Layers:
    if component is not None:
        check_part(component)
    layers: Layers = {}
    unused = []
    for key, tensor in tensors.items():
        name, _, ending = key.partition(".")
        part = part_of(name)
        if component is not None and part not in (None, component):
            continue
        refuse_foreign(file, key, ending)
        if part is None or ending not in ROLES:
            unused.append(key)
        else:
            add(file, layers, name, ROLES[ending], key, tensor)
    if unused:
        raise AdapterError(
            f"{file}: {len(unused)} tensors have names of no known use: {shorten(unused)}; "
            f"expected {' or '.join(PREFIXES.values())}<path> and then .{', .'.join(ROLES)}"
        )
    check_pairs(file, layers)
    return layers


def _update(file: Path, roles: Roles) -> Update:
    rank = rank_of(file, roles)
    return Update(roles[DOWN][1], roles[UP][1], (scalar_of(file, roles) or rank) / rank)


def _name(file: Path, path: str, paths: Collection[str], component: str | None) -> str:
    if component is not None:
        check_part(component)
        return PREFIXES[component] + flat(path)
    holder, _, rest = path.partition(".")
    part = next((part for part, holders in HOLDERS.items() if holder in holders), None)
    if part is None or not rest:
        raise AdapterError(
            f"{file}: {path} begins with no part of a pipeline; pass component=, one of "
            f"{', '.join(PREFIXES)}, to say what the paths are of"
        )
    is_double = part == "te" and any(other.startswith("text_encoder_") for other in paths)
    return PREFIXES["te1" if is_double else part] + flat(rest)


def _as_tensor(value: float) -> torch.Tensor:
    """One number as kohya stores it, in float32, or wider if that would change it."""
    narrow = torch.tensor(value, dtype=torch.float32)
    return narrow if narrow.item() == value else torch.tensor(value, dtype=torch.float64)
