"""kohya's files and LyCORIS': which they are, the updates that they hold, and the way back."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.row_blocks import swapped
from lora_fx.adapters.scaling import alpha_for
from lora_fx.adapters.settle import divided, place
from lora_fx.adapters.source_record import SourceRecord
from lora_fx.adapters.updates import AnyUpdate, Update
from lora_fx.errors import AdapterError, within
from lora_fx.formats import dialects
from lora_fx.formats.dialects import ALPHA, Contents, Layers, Roles, scalar_of, tensors_of
from lora_fx.formats.diffusers import speaks_diffusers
from lora_fx.formats.hints import Hints
from lora_fx.formats.kohya import names
from lora_fx.formats.kohya.names import DIALECT, DORA, FORM, MID, ROLES
from lora_fx.formats.peft.keys import PREFIX
from lora_fx.io.state_dict import read_file
from lora_fx.kinds import KINDS, dora, full, lora
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


def is_kohya(path: Path, keys: Collection[str]) -> bool:
    """Whether a file's tensors are named as kohya's, or as LyCORIS', or others' of that kind."""
    if any(names.part_of(key) for key in keys):
        return True
    is_peft = any(key.startswith(PREFIX) for key in keys)
    is_other = is_peft or speaks_diffusers(keys) is not False
    return not is_other and any(key.endswith(_MARKS) for key in keys)


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
        return Adapter(name, placed(layers, names.find(asked, base), base), moved={})


def _sorted(tensors: Mapping[str, torch.Tensor], component: str | None) -> Layers:
    """The tensors by layer and leaf."""
    if component is not None:
        names.check_part(component)
        tensors = {k: t for k, t in tensors.items() if names.part_of(k) in (None, component)}
    layers = dialects.sort_keys(tensors, DIALECT, names.claim)
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
    apart = names.by_algorithm(roles)
    first, *rest = ({k: roles[k] for k in roles if k in leaves} for leaves in apart)
    found = _of_one(first, layer)
    if not rest:
        return found
    beside = tensors_of(rest[0])
    return {"": full.beside(found[""], beside.get("diff"), beside.get("diff_b"))}


def _of_one(roles: Roles, layer: Layer) -> dict[str, AnyUpdate]:
    tensors = tensors_of(roles)
    algorithm = names.algorithm_of(tensors)
    if algorithm is None:
        raise AdapterError(f"{sorted(tensors)} are of no single algorithm, or part of one")
    if (algorithm == "norm") != (layer.kind == NORM):
        raise AdapterError(f"{sorted(tensors)} do not fit {layer.path}, a {layer.name}")
    if algorithm == "norm":
        own = {leaf: tensor for leaf, tensor in tensors.items() if leaf != ALPHA}
        return {_OF_NORM[leaf]: full.of_vector(leaf, tensor) for leaf, tensor in own.items()}
    if algorithm == "full" and "diff" not in tensors:
        return {"bias": full.of_vector("b_norm", tensors["diff_b"])}
    if DORA in tensors and dora.is_of_inputs(tensors[DORA], layer.own_shape):
        plain = _update({k: found for k, found in roles.items() if k != DORA}, algorithm, layer)
        return {"": dora.over_inputs(plain, tensors, layer.own_shape)}
    update = _update(roles, algorithm, layer)
    if layer.groups > 1 and isinstance(update, Update) and update.magnitude is not None:
        update = dora.evaluated_first(update, tensors, layer.own_shape)
    return {"": update}


def _update(roles: Roles, algorithm: str, layer: Layer) -> AnyUpdate:
    if algorithm == "lora":
        return _lora(roles, layer)
    tensors, alpha = tensors_of(roles), scalar_of(roles)
    settings: dict[str, object] = {"shape": layer.own_shape, "writer": "lycoris"}
    if algorithm in ("loha", "lokr"):
        rank = names.rank_of_algorithm(algorithm, tensors)
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


def size_of(roles: Roles) -> Size:
    """(out, in, *kernel) of the layer that tensors are of, as far as they tell it alone."""
    if "diff" in roles:
        return tuple(roles["diff"][1].shape)
    if not {names.DOWN_KEY, names.UP_KEY} <= roles.keys():
        return ()
    down, up = roles[names.DOWN_KEY][1], roles[names.UP_KEY][1]
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


def contents(adapter: Adapter, path: Path, hints: Hints) -> Contents:
    """A file that kohya's scripts or LyCORIS, and what reads theirs, load.

    What was read from such a file is written as it was. Another product of two factors is LoRA,
    with a magnitude DoRA; rsLoRA becomes the alpha that gives its scale over the rank. An alpha
    that float32 cannot hold is written as float64. ``component`` says what the paths are of
    (``"lycoris"``: of a model that is no part of a pipeline); without, each begins with a part's
    name in a pipeline, such as ``unet.``.
    """
    dialects.check_held(adapter, "kohya's format", adapter.replacements, problem_with)
    owners: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    for key, update in adapter.updates.items():
        module = module_of(key, update)
        name = names.name_of(module, adapter.updates, hints.component)
        if owners.setdefault(name, module) != module:
            raise AdapterError(f"{owners[name]} and {module} would both be called {name}")
        tensors |= {f"{name}.{leaf}": t for leaf, t in leaves_for(update).items()}
    return tensors, {}


def module_of(key: str, update: AnyUpdate) -> str:
    """The path of the module that an update is of: a norm's is of one of its parameters."""
    return key.rpartition(".")[0] if update.kind == "norm" else key


def problem_with(update: AnyUpdate) -> str | None:
    """What kohya's format cannot hold of an update, in words, or None."""
    own, scale = _own(update), _scale(update)
    if own is not None:
        is_scaled = names.rank_of_algorithm(own[0], own[1].tensors) is None and scale != 1
        found = f"a scale of {scale:g} of kind {own[0]!r}" if is_scaled else None
    else:
        found = dialects.not_lora(update, {dialects.DORA})
    return "a scale of 0, which it reads as 1" if found is None and scale == 0 else found


def leaves_for(update: AnyUpdate) -> dict[str, torch.Tensor]:
    """The tensors of an update that the format can hold, by leaf."""
    own = _own(update)
    if own is not None:
        algorithm, stored = own
        rank = names.rank_of_algorithm(algorithm, stored.tensors)
        return dict(stored.tensors) | _alpha(stored.tensors, _scale(update), rank)
    assert isinstance(update, Update)
    roles = lora.stored(update, FORM)
    leaves = {leaf: roles[role] for leaf, role in ROLES.items() if role in roles}
    return leaves | _alpha({}, update.scale, update.rank)


def _own(update: AnyUpdate) -> tuple[str, SourceRecord] | None:
    """The algorithm and the tensors of an update that LyCORIS wrote, or could have written."""
    stored = update.stored
    algorithm = None if stored is None else names.algorithm_of(stored.tensors)
    if stored is None or algorithm is None:
        return None
    # PEFT multiplies the full factors of a one-dimensional convolution in another order.
    is_foreign = algorithm == "lokr" and stored.settings.get("writer") != "lycoris"
    second = stored.tensors.get("lokr_w2")
    if is_foreign and second is not None and second.ndim == 3:
        return None
    return algorithm, stored


def _scale(update: AnyUpdate) -> float:
    own = update.scale if isinstance(update, Update) else update.stored_settings.get("scale", 1.0)
    return float(own)


def _alpha(
    stored: Mapping[str, torch.Tensor], scale: float, rank: int | None
) -> dict[str, torch.Tensor]:
    """The alpha that gives a scale: the stored one, if it does, or none if there is no rank."""
    if rank is None:
        return {}
    given = stored.get(ALPHA)
    if ((given.item() if given is not None else 0) or rank) / rank == scale and stored:
        return {}
    return {ALPHA: as_tensor(alpha_for(scale, rank))}


def as_tensor(value: float) -> torch.Tensor:
    """One number as kohya stores it, in float32, or wider if that would change it."""
    narrow = torch.tensor(value, dtype=torch.float32)
    return narrow if narrow.item() == value else torch.tensor(value, dtype=torch.float64)
