"""diffusers' ``pytorch_lora_weights.safetensors``: the adapters of a pipeline's models."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from lora_fx.adapter import Adapter, Update
from lora_fx.errors import AdapterError, shorten
from lora_fx.formats.diffusers_keys import COMPONENTS, sort_by_component
from lora_fx.formats.hints import Hints
from lora_fx.formats.limits import check_matrices_only
from lora_fx.formats.pairs import ALPHA, DOWN, UP, Layers, Roles, check_pairs, rank_of, scalar_of
from lora_fx.formats.peft import CONFIG
from lora_fx.formats.peft_config import PeftLora, parse_config
from lora_fx.formats.peft_describe import describe
from lora_fx.formats.peft_file import METADATA
from lora_fx.formats.strict_json import parse_object
from lora_fx.formats.tensor_file import metadata_of, read_file, write_file

WEIGHTS = "pytorch_lora_weights.safetensors"


def is_diffusers(path: Path, names: Collection[str]) -> bool:
    """Whether a directory has diffusers' file, or a file's tensors are named as diffusers'."""
    starts = tuple(f"{component}." for component in COMPONENTS)
    named = any(name.startswith(starts) and "lora" in name for name in names)
    return named or ((path / WEIGHTS).exists() and not (path / CONFIG).exists())


def read_diffusers(path: Path, name: str, hints: Hints) -> Adapter:
    """Reads a file of diffusers': every key is used, or refused by name.

    Scales come from the ``LoraConfig`` in the file's metadata, or from ``.alpha`` tensors over the
    rank; without either a scale is 1.

    Args:
        path: the file, or the directory that holds ``pytorch_lora_weights.safetensors``.
        name: of the adapter.
        hints: ``component`` reads one model's part and leaves the others out; without, paths keep
            the component's name at the front, as in the pipeline.

    Raises:
        AdapterError: names the file, the tensor or field, and what is wrong with it.
    """
    file = path / WEIGHTS if path.is_dir() else path
    components = sort_by_component(file, read_file(file, hints))
    if hints.component is not None:
        components = _chosen(file, components, hints.component)
    for layers in components.values() or [{}]:
        check_pairs(file, layers)
    text = metadata_of(file).get(METADATA)
    fields = None if text is None else parse_object(text.encode(), f"{file}: {METADATA}")
    updates: dict[str, Update] = {}
    rule = None
    for component, layers in components.items():
        config = None if fields is None else _config(file, fields, component, hints.strict)
        found = _updates(file, layers, config)
        if hints.component is not None:
            updates, rule = found, None if config is None else config.rule
        else:
            updates |= {f"{component}.{p}": update for p, update in found.items()}
    return Adapter(name, updates, expects=rule)


def write_diffusers(adapter: Adapter, path: Path, hints: Hints, force: bool) -> None:
    """Writes a file that diffusers' pipelines load, with its ``LoraConfig`` in the metadata.

    Args:
        adapter: what to write.
        path: ends in ``.safetensors``; a pipeline looks for ``pytorch_lora_weights.safetensors``.
        hints: ``component`` says what the paths are of; without, each begins with a component's
            name.
        force: replace a file that is there.

    Raises:
        AdapterError: the target exists, or the format cannot hold the adapter.
    """
    check_matrices_only(adapter, path, "diffusers' format", adapter.replacements)
    tensors: dict[str, torch.Tensor] = {}
    fields: dict[str, object] = {}
    for component, part in _parts(adapter, path, hints.component).items():
        fields |= {f"{component}.{key}": value for key, value in describe(part, []).items()}
        for module, update in part.updates.items():
            tensors[f"{component}.{module}.lora_A.weight"] = update.down
            tensors[f"{component}.{module}.lora_B.weight"] = update.up
    write_file(path, tensors, {METADATA: json.dumps(fields, indent=2, sort_keys=True)}, force)


def _chosen(file: Path, components: dict[str, Layers], wanted: str) -> dict[str, Layers]:
    if wanted not in tuple(components):
        raise AdapterError(
            f"{file}: component is {wanted!r:.80}, the file has {', '.join(components) or 'none'}"
        )
    return {wanted: components[wanted]}


def _config(file: Path, fields: Mapping[str, object], component: str, strict: bool) -> PeftLora:
    start = f"{component}."
    own = {key.removeprefix(start): v for key, v in fields.items() if key.startswith(start)}
    if not own:
        raise AdapterError(f"{file}: {METADATA} has no field of {component}, whose tensors it has")
    return parse_config({"peft_type": "LORA", **own}, f"{file}: {METADATA} of {component}", strict)


def _updates(file: Path, layers: Layers, config: PeftLora | None) -> dict[str, Update]:
    with_alpha = [path for path, roles in layers.items() if ALPHA in roles]
    without = [path for path, roles in layers.items() if ALPHA not in roles]
    if with_alpha and (without or config is not None):
        other = f"none for {shorten(without)}" if without else f"a config in {METADATA}"
        raise AdapterError(f"{file}: .alpha for {shorten(with_alpha)}, and {other}; which holds?")
    return {path: _update(file, path, roles, config) for path, roles in layers.items()}


def _update(file: Path, path: str, roles: Roles, config: PeftLora | None) -> Update:
    rank = rank_of(file, roles)
    if config is None:
        alpha = scalar_of(file, roles)
        return Update(roles[DOWN][1], roles[UP][1], 1.0 if alpha is None else alpha / rank)
    expected, scale = config.rank_and_scale(path)
    if rank != expected:
        raise AdapterError(f"{file}: {path}: rank {rank}, {METADATA} says {expected}")
    kind = "rslora" if config.use_rslora else "lora"
    return Update(roles[DOWN][1], roles[UP][1], scale, kind)


def _parts(adapter: Adapter, path: Path, component: str | None) -> dict[str, Adapter]:
    """The adapter of each component, its paths being those in the component's model."""
    expected = ", ".join(COMPONENTS)
    if component is not None:
        if component not in COMPONENTS:
            raise AdapterError(f"component is {component!r:.80}, expected one of {expected}")
        return {component: adapter}
    groups: dict[str, dict[str, Update]] = {}
    for module, update in adapter.updates.items():
        start, _, rest = module.partition(".")
        if start not in COMPONENTS or not rest:
            raise AdapterError(
                f"{path}: {module} begins with no component's name; pass component=, one of "
                f"{expected}, to say what the paths are of"
            )
        groups.setdefault(start, {})[rest] = update
    return {start: Adapter(adapter.name, updates) for start, updates in groups.items()}
