"""MLX's directories: ``adapters.safetensors`` beside an ``adapter_config.json`` of its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from lora_fx.adapters.adapter import Adapter, AnyUpdate, Update
from lora_fx.adapters.scaling import checked_rank, is_number
from lora_fx.adapters.source_record import SourceRecord
from lora_fx.errors import AdapterError, shorten, within
from lora_fx.formats.dialects import Dialect, sort_keys
from lora_fx.formats.hints import Hints
from lora_fx.formats.layer_tensors import DOWN, MAGNITUDE, UP, Roles, check_pairs, matrices_of
from lora_fx.io.state_dict import read_file
from lora_fx.io.strict_json import read_object
from lora_fx.layers.base_layers import layers_of
from lora_fx.layers.layer import Layer

CONFIG, WEIGHTS, PARAMETERS = "adapter_config.json", "adapters.safetensors", "lora_parameters"
_DIALECT = Dialect(
    {".lora_a": DOWN, ".lora_b": UP, ".m": MAGNITUDE},
    "<module>.lora_a, .lora_b, and under dora .m",
)


def is_mlx(path: Path, names: Collection[str]) -> bool:
    """Whether a directory holds MLX's file, or a file MLX's factors."""
    if path.is_dir():
        return (path / WEIGHTS).is_file()
    return any(name.endswith(tuple(_DIALECT.endings)) for name in names)


def read_mlx(path: Path, name: str, hints: Hints) -> Adapter:
    """Reads what ``mlx_lm`` trained: LoRA, DoRA, or weights as a whole.

    MLX stores factors the other way round, ``lora_a`` of (in, r) and ``lora_b`` of (r, out), and
    the scale itself. Source: mlx-lm's ``tuner/lora.py``, ``dora.py`` and ``utils.py`` of 0.28.

    Args:
        path: the directory, or its ``adapters.safetensors``.
        name: of the adapter.
        hints: ``base`` tells embeddings from linear layers; ``strict`` is heeded.

    Raises:
        AdapterError: names the file, the tensor or field, and what is wrong with it.
    """
    file = path / WEIGHTS if path.is_dir() else path
    fields, tensors = read_object(file.with_name(CONFIG)), read_file(file, hints.allow_pickle)
    kind = fields.get("fine_tune_type", "lora")
    with within(file.with_name(CONFIG)):
        if kind not in ("lora", "dora", "full"):
            raise AdapterError(f"fine_tune_type is {kind!r:.80}, expected lora, dora or full")
        rank, scale = _rank_and_scale(fields) if kind != "full" else (0, 0.0)
    with within(file):
        if kind == "full":
            return Adapter(name, {}, _whole(tensors))
        layers, base = sort_keys(tensors, _DIALECT), layers_of(hints.base)
        check_pairs(layers)
        updates: dict[str, AnyUpdate] = {}
        for module, roles in layers.items():
            with within(module):
                _check_magnitude(roles, kind)
                updates[module] = _update(roles, rank, scale, base.get(module))
    return Adapter(name, updates)


def _rank_and_scale(fields: Mapping[str, object]) -> tuple[int, float]:
    """The rank and the scale of all layers.

    Early versions took ``scale * alpha / rank``, today's leave alpha alone, and no file says which.
    """
    given = fields.get(PARAMETERS)
    if not isinstance(given, dict):
        raise AdapterError(f"{PARAMETERS} is {given!r:.80}, expected an object with rank and scale")
    with within(PARAMETERS):
        rank, scale, alpha = (given.get(name) for name in ("rank", "scale", "alpha"))
        rank = checked_rank("rank", rank)
        if not is_number(scale):
            raise AdapterError(f"scale is {scale!r:.80}, expected a finite number")
        if alpha is not None and alpha != rank:
            raise AdapterError(
                f"alpha is {alpha!r:.80}, by which the first versions of mlx_lm multiplied and "
                "today's do not: remove alpha, and multiply scale by alpha / rank if one of the "
                "first has trained it"
            )
    return rank, float(scale)


def _check_magnitude(roles: Roles, kind: object) -> None:
    if (MAGNITUDE in roles) != (kind == "dora"):
        raise AdapterError(
            f"fine_tune_type is {kind}, and .m is {'there' if MAGNITUDE in roles else 'missing'}"
        )


def _update(roles: Roles, rank: int, scale: float, layer: Layer | None) -> Update:
    """The update of one layer; a table's factors look it up, which in matrices is the same."""
    down, up = (tensor.t().contiguous() for tensor in matrices_of(roles))
    if (down.shape[0], up.shape[1]) != (rank, rank):
        raise AdapterError(
            f"lora_a {tuple(down.t().shape)} and lora_b {tuple(up.t().shape)}, expected (in, "
            f"{rank}) and ({rank}, out), of the rank in {PARAMETERS}"
        )
    magnitude = roles[MAGNITUDE][1] if MAGNITUDE in roles else None
    is_table = layer is not None and layer.is_matrix and layer.type.reads_ids
    if magnitude is not None and (is_table or magnitude.shape != (up.shape[0],)):
        raise AdapterError(
            f"m is {tuple(magnitude.shape)}, expected ({up.shape[0]},), one number an output; of "
            "an embedding MLX has one a token, which is not supported: fuse it where it was made"
        )
    stored = SourceRecord({}, {"layer": "embedding"}) if is_table else None
    kind = "lora" if magnitude is None else "dora"
    return Update(down, up, scale, kind, magnitude=magnitude, stored=stored)


def _whole(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole weights; MLX has the axes of a kernel in another order."""
    kernels = [name for name, tensor in tensors.items() if tensor.ndim > 2]
    if kernels:
        raise AdapterError(
            f"{shorten(kernels)}: of more than two axes, which MLX orders otherwise than PyTorch: "
            "save the model, and not an adapter"
        )
    return dict(tensors)
