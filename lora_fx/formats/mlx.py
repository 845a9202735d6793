"""MLX's directories: ``adapters.safetensors`` beside an ``adapter_config.json`` of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import chain, starmap
from pathlib import Path

import torch

from lora_fx.adapters.adapter import Adapter, AnyUpdate, Update
from lora_fx.adapters.scaling import checked_alpha, checked_rank
from lora_fx.errors import AdapterError, doubt, shorten, within
from lora_fx.formats.dialects import Dialect, check_adapted, sort_keys, tensors_of
from lora_fx.formats.hints import Hints
from lora_fx.io.state_dict import read_file
from lora_fx.io.strict_json import read_object
from lora_fx.kinds import dora, experts, lora
from lora_fx.kinds.lora import DOWN, MAGNITUDE, UP
from lora_fx.layers.base_layers import BaseLayers
from lora_fx.layers.layer import Layer

CONFIG, WEIGHTS, PARAMETERS = "adapter_config.json", "adapters.safetensors", "lora_parameters"
DIALECT = Dialect(
    {".lora_a": DOWN, ".lora_b": UP, ".m": MAGNITUDE, ".A": DOWN, ".B": UP},
    "<module>.lora_a, .lora_b, and under dora .m",
)
_FORM = lora.Form(down=("in", "r"), up=("r", "out"))
_TABLE = re.compile(r"emb|wte")  # what a table is called in any model of mlx-lm


def read_mlx(path: Path, name: str, hints: Hints) -> Adapter:
    """Reads what ``mlx_lm`` trained: LoRA, DoRA, or weights as a whole.

    Factors are (in, r) and (r, out), the scale is stored itself, and the base tells embeddings from
    linear layers. Source: ``tuner/`` of mlx-lm 0.32, ``trainer/peft/`` of mlx-vlm 0.7, whose legacy
    files have ``A``, ``B`` and alpha.
    """
    file = path / WEIGHTS if path.is_dir() else path
    fields, tensors = read_object(file.with_name(CONFIG)), read_file(file, hints.allow_pickle)
    kind = fields.get("fine_tune_type", "lora")
    with within(file.with_name(CONFIG)):
        if kind not in ("lora", "dora", "full"):
            raise AdapterError(f"fine_tune_type is {kind!r:.80}, expected lora, dora or full")
        rank, scale = _rank_and_scale(fields) if kind != "full" else (0, 0.0)
    with within(file):
        base = hints.layers
        tables = [name for name in tensors if _TABLE.search(name)] if hints.base is None else []
        if tables:
            told = f"{shorten(tables)}: MLX has a table's change in the head that is tied to it too"
            doubt(file, told, ": pass base=, or strict=False if none is tied", hints.strict)
        if kind == "full":
            return Adapter(name, {}, _whole(tensors, base))
        layers = sort_keys(tensors, DIALECT)
        check_adapted(layers)
        updates: dict[str, AnyUpdate] = {}
        for module, roles in chain.from_iterable(starmap(experts.apart, layers.items())):
            with within(module):
                if (MAGNITUDE in roles) != (kind == "dora"):
                    found = "there" if MAGNITUDE in roles else "missing"
                    raise AdapterError(f"fine_tune_type is {kind}, and .m is {found}")
                updates[module] = _update(roles, rank, scale, base.get(module))
                for head in base.tied_to(module):  # where MLX multiplies with the adapted table
                    t = tensors_of(roles)
                    updates[head] = Update(t[UP], t[DOWN], scale, kind, magnitude=t.get(MAGNITUDE))
    return Adapter(name, updates)


def _update(roles: lora.Roles, rank: int, scale: float, layer: Layer | None) -> AnyUpdate:
    """The update of a layer; magnitudes of a table are of its tokens, which are its inputs."""
    if layer is None or not layer.is_table or MAGNITUDE not in roles:
        return lora.read(roles, _FORM, scale=scale, rank=(rank, PARAMETERS))
    key, magnitude = roles[MAGNITUDE]
    if magnitude.shape != layer.own_shape[1:]:
        raise AdapterError(f"{key} is {tuple(magnitude.shape)}, expected {layer.own_shape[1:]}")
    rest = {role: found for role, found in roles.items() if role != MAGNITUDE}
    plain = _update(rest, rank, scale, layer)
    return dora.over_inputs(plain, {"dora_scale": magnitude}, layer.own_shape)


def _rank_and_scale(fields: Mapping[str, object]) -> tuple[int, float]:
    """The rank and the scale of all layers.

    Early versions took ``scale * alpha / rank``, today's leave alpha alone, and no file says which.
    """
    given = fields.get(PARAMETERS)
    if given is None and "rank" in fields:  # mlx_vlm's legacy
        own = checked_rank("rank", fields["rank"])
        return own, checked_alpha("alpha", fields.get("alpha", 0.1)) / own
    if not isinstance(given, dict):
        raise AdapterError(f"{PARAMETERS} is {given!r:.80}, expected an object with rank and scale")
    with within(PARAMETERS):
        rank, scale, alpha = (given.get(name) for name in ("rank", "scale", "alpha"))
        rank, scale = checked_rank("rank", rank), checked_alpha("scale", scale)
        if alpha is not None and alpha != rank:
            raise AdapterError(
                f"alpha is {alpha!r:.80}, by which the first versions of mlx_lm multiplied and "
                "today's do not: remove alpha, and multiply scale by alpha / rank if one of the "
                "first has trained it"
            )
    return rank, float(scale)


def _whole(tensors: Mapping[str, torch.Tensor], base: BaseLayers) -> dict[str, torch.Tensor]:
    """Whole weights, tied heads' too; MLX has the axes of a kernel in another order."""
    kernels = [name for name, tensor in tensors.items() if tensor.ndim > 2]
    if kernels:
        raise AdapterError(
            f"{shorten(kernels)}: of more than two axes, which MLX orders otherwise than PyTorch: "
            "save the model, and not an adapter"
        )
    tied = {name: base.tied_to(name.removesuffix(".weight")) for name in tensors}
    heads = {f"{head}.weight": tensors[name] for name, found in tied.items() for head in found}
    return {**heads, **tensors}
