"""kohya's files and LyCORIS': which they are, the updates that they hold, and the way back."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.row_blocks import swapped
from lora_fx.adapters.scaling import alpha_for, alpha_in
from lora_fx.adapters.settle import divided, place
from lora_fx.adapters.source_record import EMBEDDING, SourceRecord
from lora_fx.adapters.updates import AnyUpdate, Update
from lora_fx.errors import AdapterError, within
from lora_fx.formats import dialects
from lora_fx.formats.dialects import ALPHA, Contents, Layers, Roles, scalar_of, tensors_of
from lora_fx.formats.diffusers import speaks_diffusers
from lora_fx.formats.hints import Hints
from lora_fx.formats.peft.keys import PREFIX
from lora_fx.io.state_dict import metadata_of, read_file
from lora_fx.kinds import KINDS, dora, full, ia3, lora, oft
from lora_fx.layers.base_layers import BaseLayers
from lora_fx.layers.layer import Layer
from lora_fx.layers.layer_types import NORM
from lora_fx.layers.meanings import Meaning
from lora_fx.layers.pipeline_names import PREFIXES, check_part, find, name_of, part_of
from lora_fx.layers.resolve import Size

DOWN_KEY, UP_KEY, MID, DORA = "lora_down.weight", "lora_up.weight", "lora_mid.weight", "dora_scale"
UP_BIAS = "lora_up.bias"  # which Black Forest Labs have, and kohya has not
ROLES = {
    DOWN_KEY: lora.DOWN, UP_KEY: lora.UP, MID: lora.MID, UP_BIAS: lora.BIAS, DORA: lora.MAGNITUDE,
}  # fmt: skip
_FORM = lora.Form(is_exact=False, is_column=True)
_DIFFERENCES = frozenset({"diff", "diff_b"})
# What LyCORIS' algorithms write, by `lora_fx.kinds` where it is no name of its own.
ALGORITHMS: Mapping[str, frozenset[str]] = {
    "lora": frozenset({*ROLES, ALPHA}),
    "loha": KINDS["loha"].leaves,
    "lokr": KINDS["lokr"].leaves,
    "glora": KINDS["glora"].leaves,
    "full": _DIFFERENCES,
    "oft": oft.OF_TRAINERS,
    "ia3": ia3.LYCORIS,
    "norm": frozenset({"w_norm", "b_norm"}),
}
# The leaves whose first axis is what alpha is divided by: ``lycoris/modules`` of 4.1.3.
_RANKED = {"lora": (DOWN_KEY,), "loha": ("hada_w1_b",), "lokr": ("lokr_w1_b", "lokr_w2_b"),
           "glora": ("a2.weight",)}  # fmt: skip
# Other trainers' names of the factors.
_OTHERS = {
    ".lora_A.weight": DOWN_KEY, ".lora_B.weight": UP_KEY, ".lora_B.bias": UP_BIAS,
    ".lora_A.default.weight": DOWN_KEY, ".lora_B.default.weight": UP_KEY,
    ".lora.down.weight": DOWN_KEY, ".lora.up.weight": UP_KEY,
    ".down.weight": DOWN_KEY, ".up.weight": UP_KEY,
}  # fmt: skip
DIALECT = dialects.Dialect(
    {
        **{f".{leaf}": leaf for name in ALGORITHMS if name != "ia3" for leaf in ALGORITHMS[name]},
        **_OTHERS,
    },
    f"{' or '.join(PREFIXES.values())}<path>, or a path, and then .{DOWN_KEY}, .{UP_KEY}, "
    ".alpha, or what LyCORIS writes",
    foreign={
        r"\.(lambda_layer|[pq]_layer\.weight)$": "T-LoRA",
        r"\.scalar$": "a scaled update (LyCORIS)",
        r"\.boft_\w+$": "BOFT",
        r"\.vera_\w+$": "VeRA",
        r"\.lora_magnitude_vector[^.]*$": "PEFT's DoRA",
        r"attn\.qkv_proj\.lora_.\.default\.": "DiffSynth's of MiniMax-H3, with rows by head",
    },
)
_OF_H3 = re.compile(r"(^|[._])attn[._]qkv_proj$")  # whose one alpha may be a text beside
# What others call LyCORIS' differences of a norm's vectors.
_OF_NORMS = {"diff": "w_norm", "diff_b": "b_norm"}
_OF_NORM = {"w_norm": "weight", "b_norm": "bias"}
# Ends of keys that tell such a file, whatever its paths begin with.
_MARKS = tuple(e for e in DIALECT.endings if e[1:] not in {"diff_b", *KINDS["glora"].leaves})


def is_kohya(path: Path, keys: Collection[str]) -> bool:
    """Whether a file's tensors are named as kohya's, or as LyCORIS', or others' of that kind."""
    if any(part_of(key) for key in keys):
        return True
    is_other = any(key.startswith(PREFIX) for key in keys) or speaks_diffusers(keys) is not False
    return not is_other and any(key.endswith(_MARKS) for key in keys)


def read_kohya(path: Path, name: str, hints: Hints) -> Adapter:
    """Reads a file of kohya's or LyCORIS': every key is used, or refused by name.

    LoRA, DoRA, LoCon, LoHa, LoKr, GLoRA, (IA)3, Diag-OFT, BOFT, full differences, norms. What is
    added to a norm is an update of its parameters, ``<path>.weight``, ``<path>.bias``. The base is
    needed, for the names are lossy; ``component`` reads one part of a pipeline (unet, te, te1, te2,
    te3, lycoris) and leaves the others out.
    """
    if hints.base is None:
        raise AdapterError(
            f"{path}: kohya's names lose the dots of a path; pass base=, the model or the traced "
            "graph that the adapter is for"
        )
    tensors, base = read_file(path, hints.allow_pickle), hints.layers
    with within(path):
        if hints.component is not None:
            check_part(hints.component)
            tensors = {k: t for k, t in tensors.items() if part_of(k) in (None, hints.component)}
        layers = dialects.sort_keys(tensors, DIALECT, claim)
        if not layers:
            raise AdapterError(f"no layer of {hints.component or 'any part'}: nothing is adapted")
        if any(map(_OF_H3.search, layers)) and not any(ALPHA in own for own in layers.values()):
            alpha = alpha_in(metadata_of(path))
            told = {} if alpha is None else {ALPHA: (ALPHA, torch.tensor(alpha))}
            layers = {name: roles | told for name, roles in layers.items()}
        for roles in layers.values():
            if roles.keys() <= {ALPHA, DORA}:  # said before its layer is looked for
                lora.check_pair(roles)
        asked = {name: size_of(roles) for name, roles in layers.items()}
        return Adapter(name, placed(layers, find(asked, base), base), moved={})


def claim(rest: dialects.Tensors, layers: Layers) -> list[str]:
    """Files the vectors of (IA)3, which any layer calls its own so: below a name without dots."""
    left = []
    for key, tensor in rest.items():
        name, _, leaf = key.partition(".")
        path = key.removesuffix(".magnitude")
        down, _ = layers.get(path, {}).get(DOWN_KEY, ("", None))
        if leaf in ALGORITHMS["ia3"] and name.startswith(("lora_", "lycoris_")):
            dialects.add(layers, name, leaf, key, tensor)
        # ai-toolkit's, whose alpha is the rank: under kohya's names it is another, and left out.
        elif path != key and down.endswith(".lora_A.weight"):
            dialects.add(layers, path, DORA, key, tensor)
        else:
            left.append(key)
    return left


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
    apart = by_algorithm(roles)
    first, *rest = ({k: roles[k] for k in roles if k in leaves} for leaves in apart)
    found = _of_one(first, layer)
    if not rest:
        return found
    beside = tensors_of(rest[0])
    return {"": full.beside(found[""], beside.get("diff"), beside.get("diff_b"))}


def _of_one(roles: Roles, layer: Layer) -> dict[str, AnyUpdate]:
    tensors, algorithm = tensors_of(roles), algorithm_of(roles)
    if algorithm is None:
        raise AdapterError(f"{sorted(tensors)} are of no single algorithm, or part of one")
    if (algorithm == "norm") != (layer.kind == NORM):
        raise AdapterError(f"{sorted(tensors)} do not fit {layer.path}, a {layer.name}")
    if algorithm == "norm":
        return {_OF_NORM[k]: full.of_vector(k, t) for k, t in tensors.items() if k != ALPHA}
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
    if algorithm in ("loha", "lokr", "glora"):
        rank = rank_of_algorithm(algorithm, tensors)
        settings["scale"] = 1.0 if rank is None else (alpha or rank) / rank
    settings |= EMBEDDING.settings if algorithm == "full" and layer.is_table else {}
    if algorithm == "oft":
        settings |= oft.settings_for(tensors, layer.own_shape, alpha)
    return KINDS[algorithm].read(tensors, settings)


def _lora(roles: Roles, layer: Layer) -> AnyUpdate:
    """LoRA, LoCon's Tucker form of it, and DoRA over either; an alpha of 0 is none."""
    pair = {ROLES[leaf]: found for leaf, found in roles.items() if leaf in ROLES}
    update = lora.read(pair, _FORM, alpha=scalar_of(roles) or None)
    # A file may have a layer as a matrix that the base has as a convolution, or the reverse.
    found, own = update.shape, layer.own_shape
    if (found[0], math.prod(found[1:])) != (own[0], math.prod(own[1:])):
        raise AdapterError(f"made for a layer {found}, the {layer.name} is {own}")
    if MID not in roles:
        return update
    return replace(update, stored=SourceRecord(tensors_of(roles), {"scale": update.scale}))


def size_of(roles: Roles) -> Size:
    """(out, in, *kernel) of the layer that tensors are of, as far as they tell it alone."""
    if "diff" in roles:
        return tuple(roles["diff"][1].shape)
    if not {DOWN_KEY, UP_KEY} <= roles.keys():
        return ()
    down, up = roles[DOWN_KEY][1], roles[UP_KEY][1]
    return *up.shape[:1], *down.shape[1 : 2 if MID in roles else None]


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


def algorithm_of(leaves: Collection[str]) -> str | None:
    """Which algorithm wrote these leaves; None if no single one writes them all."""
    names = frozenset(leaves)
    found = (name for name, own in ALGORITHMS.items() if names <= own and names - {ALPHA, DORA})
    return next(found, None)


def by_algorithm(leaves: Collection[str]) -> list[frozenset[str]]:
    """The leaves of one layer, apart where a full difference stands beside another algorithm."""
    names = frozenset(leaves)
    beside = names & _DIFFERENCES
    if not beside or algorithm_of(names) is not None:
        return [names]
    rest = names - beside
    return [rest, beside] if rest - {ALPHA} else [beside]


def rank_of_algorithm(algorithm: str, tensors: Mapping[str, torch.Tensor]) -> int | None:
    """What LyCORIS divides alpha by, or None where it has no scale, as LoKr of full factors."""
    found = (tensors[leaf] for leaf in _RANKED.get(algorithm, ()) if leaf in tensors)
    return next((len(tensor) for tensor in found if tensor.ndim > 0), None)


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
        name = name_of(module, adapter.updates, hints.component)
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
        is_scaled = rank_of_algorithm(own[0], own[1].tensors) is None and scale != 1
        found = f"a scale of {scale:g} of kind {own[0]!r}" if is_scaled else None
    else:
        found = dialects.not_lora(update, {dialects.DORA})
    return "a scale of 0, which it reads as 1" if found is None and scale == 0 else found


def leaves_for(update: AnyUpdate) -> dict[str, torch.Tensor]:
    """The tensors of an update that the format can hold, by leaf."""
    own = _own(update)
    if own is not None:
        algorithm, stored = own
        rank = rank_of_algorithm(algorithm, stored.tensors)
        return dict(stored.tensors) | _alpha(stored.tensors, _scale(update), rank)
    assert isinstance(update, Update)
    roles = lora.stored(update, _FORM)
    leaves = {leaf: roles[role] for leaf, role in ROLES.items() if role in roles}
    return leaves | _alpha({}, update.scale, update.rank)


def _own(update: AnyUpdate) -> tuple[str, SourceRecord] | None:
    """The algorithm and the tensors of an update that LyCORIS wrote, or could have written."""
    stored = update.stored
    algorithm = None if stored is None else algorithm_of(stored.tensors)
    if stored is None or algorithm is None:
        return None
    # PEFT multiplies the full factors of a one-dimensional convolution in another order.
    is_foreign = stored.settings.get("writer") not in ("lycoris", "onetrainer")
    second, turn = (stored.tensors.get(leaf) for leaf in ("lokr_w2", "oft_R.weight"))
    if is_foreign and (turn is not None or (second is not None and second.ndim == 3)):
        return None
    return algorithm, stored


def _scale(update: AnyUpdate) -> float:
    own = update.scale if isinstance(update, Update) else update.stored_settings.get("scale", 1.0)
    return float(own)


def _alpha(stored: dialects.Tensors, scale: float, rank: int | None) -> dict[str, torch.Tensor]:
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
