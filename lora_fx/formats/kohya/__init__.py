"""kohya's files and LyCORIS' as updates: which they are, whose layers, and what a layer's hold."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.other_updates import WeightUpdate, added, evaluated
from lora_fx.adapters.row_blocks import swapped
from lora_fx.adapters.settle import divided, place
from lora_fx.adapters.source_record import SourceRecord
from lora_fx.adapters.updates import AnyUpdate, Update
from lora_fx.algebra.matrix_expr import Matrix, Sum, constant
from lora_fx.errors import AdapterError, within
from lora_fx.formats.dialects import ALPHA, Layers, Roles, scalar_of, sort_keys, tensors_of
from lora_fx.formats.diffusers import speaks_diffusers
from lora_fx.formats.hints import Hints
from lora_fx.formats.kohya.names import (
    DIALECT,
    DORA,
    DOWN_KEY,
    FORM,
    MID,
    ROLES,
    UP_KEY,
    algorithm_of,
    by_algorithm,
    check_part,
    claim,
    find,
    part_of,
    rank_of_algorithm,
)
from lora_fx.formats.peft.keys import PREFIX
from lora_fx.io.state_dict import read_file
from lora_fx.kinds import KINDS, dora, lora
from lora_fx.layers.base_layers import BaseLayers, layers_of
from lora_fx.layers.layer import Layer
from lora_fx.layers.layer_types import NORM
from lora_fx.layers.meanings import Meaning
from lora_fx.layers.resolve import Size

# What others call LyCORIS' differences of a norm's vectors.
_OF_NORMS = {"diff": "w_norm", "diff_b": "b_norm"}
_OF_NORM = {"w_norm": "weight", "b_norm": "bias"}
# Ends of keys that tell such a file, whatever its paths begin with.
_MARKS = tuple(end for end in DIALECT.endings if end not in (".alpha", ".diff_b"))


def is_kohya(path: Path, names: Collection[str]) -> bool:
    """Whether a file's tensors are named as kohya's, or as LyCORIS', or others' of that kind."""
    if any(part_of(name) for name in names):
        return True
    is_peft = any(name.startswith(PREFIX) for name in names)
    is_other = is_peft or speaks_diffusers(names) is not False
    return not is_other and any(name.endswith(_MARKS) for name in names)


def read_kohya(path: Path, name: str, hints: Hints) -> Adapter:
    """Reads a file of kohya's or LyCORIS': every key is used, or refused by name.

    LoRA, DoRA, LoCon, LoHa, LoKr, (IA)3, Diag-OFT, full differences and norms. What is added to a
    norm is an update of its parameters, ``<path>.weight`` and ``<path>.bias``. The base is needed,
    for the names are lossy; ``component`` reads one part of a pipeline (unet, te, te1, te2, te3,
    lycoris) and leaves the others out.
    """
    if hints.base is None:
        raise AdapterError(
            f"{path}: kohya's names lose the dots of a path; pass base=, the model or the traced "
            "graph that the adapter is for"
        )
    tensors, base = read_file(path, hints.allow_pickle), layers_of(hints.base)
    with within(path):
        layers = _sorted(tensors, hints.component)
        for roles in layers.values():
            if roles.keys() <= {ALPHA, DORA}:  # said before its layer is looked for
                lora.check_pair(roles)
        asked = {name: size_of(roles) for name, roles in layers.items()}
        return Adapter(name, placed(layers, find(asked, base), base), moved={})


def _sorted(tensors: Mapping[str, torch.Tensor], component: str | None) -> Layers:
    """The tensors by layer and leaf."""
    if component is not None:
        check_part(component)
        tensors = {k: t for k, t in tensors.items() if part_of(k) in (None, component)}
    layers = sort_keys(tensors, DIALECT, claim)
    if not layers:
        raise AdapterError(f"no layer of {component or 'any part'} in it: nothing is adapted")
    return layers


def updates_of(roles: Roles, layer: Layer) -> dict[str, AnyUpdate]:
    """What the tensors of one name change: a layer, or its parameters.

    The scale is alpha over the rank, as sd-scripts (``networks/lora.py``) and LyCORIS have it; an
    alpha that is missing or 0 is the rank. rsLoRA's root is in LyCORIS' alpha already. A full
    difference beside another algorithm is added to what that one makes of the weight.
    It gives "" -> the layer's update; ``weight`` or ``bias`` -> that parameter's.
    """
    if not layer.in_files:
        raise AdapterError(
            f"is of {layer.path}, a {layer.name}; linear, embedding, convolution and norm layers "
            "are supported"
        )
    if layer.kind == NORM:
        roles = {_OF_NORMS.get(leaf, leaf): found for leaf, found in roles.items()}
    first, *rest = ({k: roles[k] for k in roles if k in leaves} for leaves in by_algorithm(roles))
    found = _of_one(first, layer)
    return _with_difference(found[""], rest[0]) if rest else found


def _of_one(roles: Roles, layer: Layer) -> dict[str, AnyUpdate]:
    tensors = tensors_of(roles)
    algorithm = algorithm_of(tensors)
    if algorithm is None:
        raise AdapterError(f"{sorted(tensors)} are of no single algorithm, or part of one")
    if (algorithm == "norm") != (layer.kind == NORM):
        raise AdapterError(f"{sorted(tensors)} do not fit {layer.path}, a {layer.name}")
    if algorithm == "norm":
        return {_OF_NORM[leaf]: _added(leaf, t) for leaf, t in tensors.items() if leaf != ALPHA}
    if algorithm == "full" and "diff" not in tensors:
        return {"bias": _added("b_norm", tensors["diff_b"])}
    if DORA not in tensors or not dora.is_of_inputs(tensors[DORA], layer.own_shape):
        update = _update(roles, algorithm, layer)
        return {"": _on_groups(update, tensors, layer)}
    plain = _update({k: found for k, found in roles.items() if k != DORA}, algorithm, layer)
    return {"": dora.over_inputs(plain, tensors, layer.own_shape)}


def _with_difference(update: AnyUpdate, roles: Roles) -> dict[str, AnyUpdate]:
    """An update, and ``diff`` added to its weight, ``diff_b`` to its bias."""
    diff, shift = (roles[leaf][1] if leaf in roles else None for leaf in ("diff", "diff_b"))
    own = update.shift(lambda: None)
    bias = own if shift is None else shift if own is None else own + shift
    if diff is None and isinstance(update, Update) and update.scale != 0:
        wide = torch.promote_types(update.up.dtype, torch.float32)
        return {"": replace(update, bias=None if bias is None else bias.to(wide) / update.scale)}

    def function(weight: Matrix) -> Matrix:
        whole = update.of(weight)
        return whole if diff is None else Sum(whole, constant(diff, weight.shape))

    shape = update.shape if diff is None else tuple(diff.shape)
    return {"": WeightUpdate("full", function, shape, bias=bias)}


def _update(roles: Roles, algorithm: str, layer: Layer) -> AnyUpdate:
    if algorithm == "lora":
        return _lora(roles, layer)
    tensors, alpha = tensors_of(roles), scalar_of(roles)
    settings: dict[str, object] = {"shape": layer.own_shape, "writer": "lycoris"}
    if algorithm in ("loha", "lokr"):
        rank = rank_of_algorithm(algorithm, tensors)
        settings["scale"] = 1.0 if rank is None else (alpha or rank) / rank
    if algorithm == "oft":
        settings["constraint"] = alpha or 0.0
    return KINDS[algorithm].read(tensors, settings)


def _lora(roles: Roles, layer: Layer) -> AnyUpdate:
    """LoRA, LoCon's Tucker form of it, and DoRA over either; an alpha of 0 is none."""
    pair = {ROLES[leaf]: found for leaf, found in roles.items() if leaf in ROLES}
    update = lora.read(pair, FORM, alpha=scalar_of(roles) or None)
    # A file may have a layer as a matrix that the base has as a convolution, or the reverse.
    out, *inner = update.shape
    if (out, math.prod(inner)) != (layer.own_shape[0], math.prod(layer.own_shape[1:])):
        found = update.shape
        raise AdapterError(f"made for a layer {found}, the {layer.name} is {layer.own_shape}")
    if MID not in roles:
        return update
    return replace(update, stored=SourceRecord(tensors_of(roles), {"scale": update.scale}))


def _on_groups(update: AnyUpdate, tensors: Mapping[str, torch.Tensor], layer: Layer) -> AnyUpdate:
    """DoRA on a grouped convolution as a function of the weight, the one form that it has."""
    if not isinstance(update, Update) or update.magnitude is None or layer.groups == 1:
        return update
    stored = update.stored or SourceRecord(tensors, {"scale": update.scale})
    plain = replace(update, magnitude=None)
    whole = evaluated(plain, layer.own_shape, stored)
    return dora.with_magnitude(whole, {DORA: tensors[DORA]})


def size_of(roles: Roles) -> Size:
    """(out, in, *kernel) of the layer that tensors are of, as far as they tell it alone."""
    if "diff" in roles:
        return tuple(roles["diff"][1].shape)
    if not {DOWN_KEY, UP_KEY} <= roles.keys():
        return ()
    down, up = roles[DOWN_KEY][1], roles[UP_KEY][1]
    return up.shape[0], *down.shape[1 : 2 if MID in roles else None]


def placed(layers: Layers, meant: Mapping[str, Meaning], base: BaseLayers) -> dict[str, AnyUpdate]:
    """The updates of a file, by the paths of the base; ``meant`` are the layers of each name."""
    updates: dict[str, AnyUpdate] = {}
    vectors: dict[str, AnyUpdate] = {}
    for name, roles in layers.items():
        meaning = meant[name]
        with within(name):
            layer = meaning.layer(base, (size_of(roles) or (None,))[0])
            for key, update in updates_of(roles, layer).items():
                if key:
                    vectors |= _of_vectors(meaning, key, update, base)
                else:
                    updates[name] = update
    return place(updates, {name: meant[name] for name in updates}, base) | vectors


def _of_vectors(
    meaning: Meaning, key: str, update: AnyUpdate, base: BaseLayers
) -> dict[str, AnyUpdate]:
    """An update of the biases of several layers, or of a norm's vectors."""
    if not meaning.is_all:
        raise AdapterError(f"is of a part of {meaning.layers[0]}, whose {key} it cannot change")
    whole = swapped(update) if meaning.halves_swapped else update
    parts = divided(whole, meaning.layers, base)
    return {f"{path}.{key}": part for path, part in parts.items()}


def _added(leaf: str, change: torch.Tensor) -> AnyUpdate:
    """What is added to a norm's weight or bias: ``lycoris/modules/norms.py`` of 4.1.3."""
    stored = SourceRecord({leaf: change})
    return WeightUpdate("norm", added(change), tuple(change.shape), stored)
