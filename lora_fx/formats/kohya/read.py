"""The tensors of one layer in a file of kohya's or LyCORIS', as updates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from lora_fx.adapters.other_updates import AnyUpdate, WeightUpdate, evaluated
from lora_fx.adapters.source_record import SourceRecord
from lora_fx.adapters.updates import Update
from lora_fx.algebra.matrix_expr import Matrix, Sum, constant
from lora_fx.errors import AdapterError
from lora_fx.formats.kohya.algorithms import (
    DORA,
    DOWN_KEY,
    MID,
    ROLES,
    UP_BIAS,
    algorithm_of,
    by_algorithm,
    rank_of_algorithm,
)
from lora_fx.formats.kohya.vectors import (
    ia3_update,
    is_of_inputs,
    norm_update,
    with_input_magnitude,
)
from lora_fx.formats.layer_tensors import (
    ALPHA,
    Roles,
    check_no_half,
    factors_of,
    scalar_of,
)
from lora_fx.kinds import KINDS, dora
from lora_fx.layers.layer import Layer
from lora_fx.layers.layer_types import NORM

# What others call LyCORIS' differences of a norm's vectors.
_OF_NORMS = {"diff": "w_norm", "diff_b": "b_norm"}


def updates_of(roles: Roles, layer: Layer) -> dict[str, AnyUpdate]:
    """What the tensors of one name change: a layer, or its parameters.

    The scale is alpha over the rank, as sd-scripts (``networks/lora.py``) and LyCORIS have it; an
    alpha that is missing or 0 is the rank. rsLoRA's root is in LyCORIS' alpha already. A full
    difference beside another algorithm is added to what that one makes of the weight.

    Args:
        roles: leaf -> key and tensor.
        layer: as the base has it.

    Returns:
        "" -> update of the layer; ``weight`` or ``bias`` -> update of that parameter.

    Raises:
        AdapterError: tensors of several algorithms, of another layer, or of wrong shapes.
    """
    if not layer.in_files:
        raise AdapterError(
            f"is of {layer.path}, a {layer.name}; linear, embedding, convolution and norm layers "
            "are supported"
        )
    if layer.kind == NORM:
        roles = {_OF_NORMS.get(leaf, leaf): found for leaf, found in roles.items()}
    first, *rest = (
        {leaf: found for leaf, found in roles.items() if leaf in leaves}
        for leaves in by_algorithm(roles)
    )
    found = _of_one(first, layer)
    return _with_difference(found[""], rest[0]) if rest else found


def _of_one(roles: Roles, layer: Layer) -> dict[str, AnyUpdate]:
    tensors = {leaf: tensor for leaf, (_, tensor) in roles.items()}
    algorithm = algorithm_of(tensors)
    if algorithm is None:
        raise AdapterError(f"{sorted(tensors)} are of no single algorithm, or part of one")
    if (algorithm == "norm") != (layer.kind == NORM):
        raise AdapterError(f"{sorted(tensors)} do not fit {layer.path}, a {layer.name}")
    if algorithm == "norm":
        return dict(norm_update(leaf, t) for leaf, t in tensors.items() if leaf != ALPHA)
    if algorithm == "full" and "diff" not in tensors:
        return {"bias": norm_update("b_norm", tensors["diff_b"])[1]}
    if algorithm == "ia3":
        return {"": ia3_update(tensors, layer)}
    scale = tensors.get(DORA)
    if scale is None or not is_of_inputs(scale, layer):
        update = _update(roles, algorithm, layer)
        return {"": _on_groups(update, tensors, layer)}
    rest = {leaf: found for leaf, found in roles.items() if leaf != DORA}
    plain = _update(rest, algorithm, layer)
    return {"": with_input_magnitude(plain, tensors, layer)}


def _with_difference(update: AnyUpdate, roles: Roles) -> dict[str, AnyUpdate]:
    """An update, and ``diff`` added to its weight, ``diff_b`` to its bias."""
    diff, shift = (roles[leaf][1] if leaf in roles else None for leaf in ("diff", "diff_b"))
    own = update.shift(lambda: None)
    bias = own if shift is None else shift if own is None else own + shift
    if diff is None and isinstance(update, Update) and update.scale != 0:
        wide = torch.promote_types(update.up.dtype, torch.float32)
        return {"": replace(update, bias=None if bias is None else bias.to(wide) / update.scale)}
    delta = diff

    def function(weight: Matrix) -> Matrix:
        whole = update.of(weight)
        return whole if delta is None else Sum(whole, constant(delta, weight.shape))

    shape = update.shape if diff is None else tuple(diff.shape)
    return {"": WeightUpdate("full", function, shape, bias=bias)}


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
        stored = SourceRecord(tensors, {"scale": scale})
    # A file may have a layer as a matrix that the base has as a convolution, or the reverse.
    if (len(up), math.prod(down.shape[1:])) != (layer.own_shape[0], math.prod(layer.own_shape[1:])):
        found = len(up), *down.shape[1:]
        raise AdapterError(f"made for a layer {found}, the {layer.name} is {layer.own_shape}")
    kind, bias = "dora" if DORA in tensors else "lora", tensors.get(UP_BIAS)
    update = Update(down, up, scale, kind, bias, stored=stored)
    return dora.with_magnitude(update, {k: t for k, t in tensors.items() if k == DORA})


def _on_groups(update: AnyUpdate, tensors: Mapping[str, torch.Tensor], layer: Layer) -> AnyUpdate:
    """DoRA on a grouped convolution as a function of the weight, the one form that it has."""
    if not isinstance(update, Update) or update.magnitude is None or layer.groups == 1:
        return update
    stored = update.stored or SourceRecord(tensors, {"scale": update.scale})
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
