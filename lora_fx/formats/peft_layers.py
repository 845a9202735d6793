"""The layers of a PEFT file as updates, whatever type they are of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.adapters.source_record import Stored
from lora_fx.errors import AdapterError, within
from lora_fx.formats.peft_experts import read_experts
from lora_fx.formats.peft_lora import DOWN, read_lora
from lora_fx.formats.peft_places import Place, places_of
from lora_fx.formats.peft_record import PeftConfig
from lora_fx.formats.peft_replaced import SortedKeys
from lora_fx.formats.peft_vera import projections
from lora_fx.kinds import KINDS
from lora_fx.layers.base_layers import BaseLayers

Tensors = Mapping[str, torch.Tensor]


def read_layers(
    keys: SortedKeys, config: PeftConfig, base: BaseLayers
) -> tuple[dict[str, AnyUpdate], list[str]]:
    """Reads every layer of a file.

    Args:
        keys: its tensors by use.
        config: what they mean.
        base: what is known of the model.

    Returns:
        The updates by path, and what the patterns may be asked about.

    Raises:
        AdapterError: names the layer, and what is wrong with it.
    """
    updates: dict[str, AnyUpdate] = {}
    if config.type.kind == "lora":
        places = places_of(keys.layers, config, base)
        for path, place in places.items():
            with within(path):
                updates[place.path] = _lora(place, keys.layers[path], config, base)
        return updates, [place.asked for place in places.values()]
    shared = projections(keys, config, base) if config.type.name == "VERA" else {}
    for path, tensors in keys.layers.items():
        with within(path):
            updates[path] = _of_kind(path, {**tensors, **shared}, config, base)
    return updates, list(updates)


def read_tokens(keys: SortedKeys, config: PeftConfig, base: BaseLayers) -> dict[str, AnyUpdate]:
    """Reads the trained rows of every table of a file, and of the heads tied to them.

    Args:
        keys: its tensors by use.
        config: which tokens they are.
        base: tells the heads: PEFT trains what ``tie_word_embeddings`` ties, and stores one.

    Raises:
        AdapterError: names the table, and what is wrong with it.
    """
    if config.tokens is not None and not keys.tokens:
        raise AdapterError("trainable_token_indices is there, but no .trainable_tokens_delta is")
    updates: dict[str, AnyUpdate] = {}
    for path, rows in keys.tokens.items():
        indices = _indices(path, config)
        tensors = {"trainable_tokens_delta": rows}
        updates[path] = _rows(path, tensors, {"indices": indices}, base)
        for tied in base.tied_to(path):
            if tied not in keys.tokens:
                settings = {"indices": indices, "tied": path}
                updates[tied] = _rows(tied, tensors, settings, base)
    return updates


def is_head(path: str, base: BaseLayers) -> bool:
    """Whether a layer with a row for each token is linear; without a base its name tells."""
    if base.shape_of(path):
        return base[path].is_linear
    return "head" in path.rpartition(".")[2]


def _rows(
    path: str, tensors: Tensors, settings: Mapping[str, object], base: BaseLayers
) -> AnyUpdate:
    own = {"head": is_head(path, base), **_shape(path, base)}
    with within(path):
        return KINDS["tokens"].read(tensors, {**settings, **own})


def _indices(path: str, config: PeftConfig) -> list[int]:
    if not isinstance(config.tokens, Mapping):
        return list(config.tokens or ())
    for name, indices in config.tokens.items():
        if path.endswith(name):
            return list(indices)
    raise AdapterError(
        f"trainable_token_indices names {', '.join(config.tokens)}, not {path}, of which "
        "there are trained tokens"
    )


def _lora(place: Place, tensors: Tensors, config: PeftConfig, base: BaseLayers) -> AnyUpdate:
    if place.parameter is None:
        return read_lora(place.asked, tensors, config)
    rank = config.rank_and_scale(place.asked)[0]
    down = tensors.get(DOWN)
    is_stack = down is not None and down.shape[:1] != (rank,)
    if is_stack if place.shape is None else len(place.shape) == 3:
        return read_experts(place, tensors, config, base)
    update = read_lora(place.asked, tensors, config)
    settings = {"parameter": place.parameter, "depth": place.depth}
    return replace(update, stored=Stored({}, settings))


def _of_kind(path: str, tensors: Tensors, config: PeftConfig, base: BaseLayers) -> AnyUpdate:
    settings = config.type.settings(config, path, tensors)
    rank = config.rank_and_scale(path)[0]
    for leaf in config.type.ranked:
        if leaf in tensors and tensors[leaf].shape[:1] != (rank,):
            raise AdapterError(
                f"{leaf} {tuple(tensors[leaf].shape)} should be of rank {rank} by "
                f"{config.type.rank[0] if config.type.rank else 'r'} or rank_pattern"
            )
    if config.type.kind == "tokens":
        settings["head"] = is_head(path, base)
    return KINDS[config.type.kind].read(tensors, {**settings, **_shape(path, base)})


def _shape(path: str, base: BaseLayers) -> dict[str, object]:
    shape = base.shape_of(path)
    return {"shape": shape} if shape else {}
