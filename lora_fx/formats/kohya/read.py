"""The tensors of one layer in a file of kohya's or LyCORIS', as updates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from lora_fx.adapters.other_updates import AnyUpdate, evaluated
from lora_fx.adapters.source_record import Stored
from lora_fx.adapters.updates import Update
from lora_fx.errors import AdapterError
from lora_fx.formats.kohya.algorithms import (
    DORA,
    DOWN_KEY,
    MID,
    ROLES,
    algorithm_of,
    rank_of_algorithm,
)
from lora_fx.formats.kohya.vectors import (
    ia3_update,
    is_of_inputs,
    norm_update,
    with_input_magnitude,
)
from lora_fx.formats.layer_tensors import Roles, check_no_half, factors_of, scalar_of
from lora_fx.kinds import KINDS, dora
from lora_fx.layers.layer import Layer
from lora_fx.layers.layer_types import NORM


def updates_of(roles: Roles, path: str, layer: Layer) -> dict[str, AnyUpdate]:
    """What the tensors of one name change: a layer, or the parameters of a norm.

    The scale is alpha over the rank, as sd-scripts (``networks/lora.py``) and LyCORIS have it; an
    alpha that is missing or 0 is the rank. rsLoRA's root is in LyCORIS' alpha already.

    Args:
        roles: leaf -> key and tensor.
        path: of the layer in the base.
        layer: as the base has it.

    Returns:
        Path of the layer, or of a norm's parameter -> update.

    Raises:
        AdapterError: tensors of several algorithms, of another layer, or of wrong shapes.
    """
    tensors = {leaf: tensor for leaf, (_, tensor) in roles.items()}
    algorithm = algorithm_of(tensors)
    if algorithm is None:
        raise AdapterError(f"{sorted(tensors)} are of no single algorithm, or part of one")
    if (algorithm == "norm") != (layer.kind == NORM):
        raise AdapterError(f"{sorted(tensors)} do not fit {path}, a {layer.name}")
    if algorithm == "norm":
        return dict(norm_update(path, leaf, tensor) for leaf, tensor in tensors.items())
    if algorithm == "ia3":
        return {path: ia3_update(tensors, layer)}
    scale = tensors.get(DORA)
    if scale is None or not is_of_inputs(scale, layer):
        update = _update(roles, algorithm, layer)
        return {path: _on_groups(update, tensors, layer)}
    rest = {leaf: found for leaf, found in roles.items() if leaf != DORA}
    plain = _update(rest, algorithm, layer)
    return {path: with_input_magnitude(plain, tensors, layer)}


def _update(roles: Roles, algorithm: str, layer: Layer) -> AnyUpdate:
    tensors = {leaf: tensor for leaf, (_, tensor) in roles.items()}
    if algorithm == "lora":
        return _lora(roles, layer)
    settings: dict[str, object] = {"shape": layer.own_shape, "writer": "lycoris"}
    if algorithm in ("loha", "lokr"):
        settings["scale"] = _scale(algorithm, roles, tensors)
    if algorithm == "oft":
        settings["constraint"] = scalar_of(roles) or 0.0
    return KINDS[algorithm].read(tensors, settings)


def _scale(algorithm: str, roles: Roles, tensors: Mapping[str, torch.Tensor]) -> float:
    rank = rank_of_algorithm(algorithm, tensors)
    return 1.0 if rank is None else (scalar_of(roles) or rank) / rank


def _lora(roles: Roles, layer: Layer) -> AnyUpdate:
    """LoRA, LoCon's Tucker form of it, and DoRA over either.

    The Tucker form has a core (r, r, *kernel) between a down- and an up-projection of single
    points. Joined with the core, down is (r, in, *kernel): the same product, exactly.
    """
    tensors = {leaf: tensor for leaf, (_, tensor) in roles.items()}
    check_no_half([{ROLES.get(leaf, leaf): found for leaf, found in roles.items()}])
    down, up = factors_of({ROLES[leaf]: roles[leaf] for leaf in ROLES})
    scale, stored = _scale("lora", roles, tensors), None
    if MID in tensors:
        down = _with_core(down, tensors[MID])
        stored = Stored(tensors, {"scale": scale})
    # A file may have a layer as a matrix that the base has as a convolution, or the reverse.
    if (len(up), math.prod(down.shape[1:])) != (layer.own_shape[0], math.prod(layer.own_shape[1:])):
        found = len(up), *down.shape[1:]
        raise AdapterError(f"made for a layer {found}, the {layer.name} is {layer.own_shape}")
    update = Update(down, up, scale, "dora" if DORA in tensors else "lora", stored=stored)
    return dora.with_magnitude(update, {k: t for k, t in tensors.items() if k == DORA})


def _on_groups(update: AnyUpdate, tensors: Mapping[str, torch.Tensor], layer: Layer) -> AnyUpdate:
    """DoRA on a grouped convolution as a function of the weight, the one form that it has."""
    if not isinstance(update, Update) or update.magnitude is None or layer.groups == 1:
        return update
    stored = update.stored or Stored(tensors, {"scale": update.scale})
    plain = replace(update, magnitude=None)
    whole = evaluated(plain, layer.own_shape, stored)
    return dora.with_magnitude(whole, {DORA: tensors[DORA]})


def _with_core(down: torch.Tensor, core: torch.Tensor) -> torch.Tensor:
    """(r, in, *kernel) in float32 or wider, of (r, in, 1, ...) and (r, r, *kernel)."""
    points, rank = all(size == 1 for size in down.shape[2:]), len(down)
    if core.ndim < 3 or core.ndim != down.ndim or not points or core.shape[:2] != (rank, rank):
        raise AdapterError(
            f"{MID} is {tuple(core.shape)} beside {DOWN_KEY} {tuple(down.shape)}, "
            "expected (r, r, *kernel) beside (r, in, 1, ...)"
        )
    wide = torch.promote_types(down.dtype, torch.float32)
    return torch.einsum("rq...,qi->ri...", core.to(wide), down.to(wide).flatten(1))
