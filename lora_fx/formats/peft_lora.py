"""The tensors of one layer under PEFT's LoRA, by the kind of layer that they were made for."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lora_fx.adapters.parameter_updates import for_parameter
from lora_fx.adapters.source_record import Stored, is_embedding
from lora_fx.adapters.updates import Update
from lora_fx.errors import AdapterError
from lora_fx.formats.pairs import UP_AXES, magnitude_axes, magnitude_beside, up_beside
from lora_fx.formats.peft_record import PeftConfig
from lora_fx.layers.axes import shape_of, sizes_of

DOWN, UP, UP_BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
TABLE_DOWN, TABLE_UP = "lora_embedding_A", "lora_embedding_B"
MAGNITUDE = "lora_magnitude_vector"
Tensors = Mapping[str, torch.Tensor]


def read_lora(path: str, tensors: Tensors, config: PeftConfig) -> Update:
    """Reads the update of one layer: shapes and rank must agree with each other and the config.

    ``lora_A`` is (r, in) or (r, in, *kernel), ``lora_B`` (out, r) or (out, r / groups, 1, ...); of
    a table (num, dim) ``lora_embedding_A`` is (r, num) and ``lora_embedding_B`` (dim, r), which are
    already down and up of a layer from num to dim. ``lora_magnitude_vector`` is (out,), or
    (1, out, 1, ...) of a convolution.

    Args:
        path: what the patterns are asked about.
        tensors: by leaf.
        config: what decides rank and scale.

    Raises:
        AdapterError: a tensor is missing, one too many or of another shape.
    """
    is_table = TABLE_DOWN in tensors or TABLE_UP in tensors
    first, second = (TABLE_DOWN, TABLE_UP) if is_table else (DOWN, UP)
    _check_leaves(tensors, (first, second), config, is_table)
    down, up, bias = tensors[first], tensors[second], tensors.get(UP_BIAS)
    rank, scale = config.rank_and_scale(path)
    shapes = f"{first.partition('.')[0]} {tuple(down.shape)} and {tuple(up.shape)}"
    kernel = down.ndim - 2
    fits = kernel in ((0,) if is_table else (0, 1, 2, 3)) and up.ndim == down.ndim
    if not fits or sizes_of(UP_AXES, up.shape) is None:
        raise AdapterError(
            f"{shapes} are no pair: expected (r, in) and (out, r), or of a "
            "convolution (r, in, *kernel) and (out, r, 1, ...)"
        )
    ranks = up.shape[1] if kernel == 0 else rank - rank % max(up.shape[1], 1)
    if down.shape[0] != rank or ranks != rank:
        raise AdapterError(
            f"{shapes} should be of rank {rank} by r or rank_pattern: (r, in) and (out, r)"
        )
    if bias is not None and bias.shape != (up.shape[0],):
        raise AdapterError(
            f"lora_B.bias {tuple(bias.shape)}, expected ({up.shape[0]},) as in lora_B"
        )
    magnitude = _magnitude(tensors, up.shape[0], kernel)
    plain = "rslora" if config.use_rslora else "lora"
    kind = plain if magnitude is None else "dora"
    settings: dict[str, object] = {"layer": "embedding"} if is_table else {}
    settings |= {"use_rslora": True} if kind == "dora" and config.use_rslora else {}
    return Update(
        down, up.flatten(1), scale, kind, bias, magnitude,
        stored=Stored({}, settings) if settings else None,
    )  # fmt: skip


def _check_leaves(
    tensors: Tensors, pair: tuple[str, str], config: PeftConfig, is_table: bool
) -> None:
    missing = [leaf for leaf in pair if leaf not in tensors]
    if missing:
        raise AdapterError(f"half of a pair, {missing[0]} is missing beside {sorted(tensors)}")
    wanted = {*pair, *([MAGNITUDE] if config.use_dora else [])}
    wanted |= {UP_BIAS} if config.lora_bias and not is_table else set()
    odd = sorted(wanted ^ tensors.keys())
    if odd:
        raise AdapterError(
            f"has {sorted(tensors)}, expected {sorted(wanted)}: lora_bias is "
            f"{config.lora_bias} and use_dora {config.use_dora}"
        )


def _magnitude(tensors: Tensors, out: int, kernel: int) -> torch.Tensor | None:
    magnitude = tensors.get(MAGNITUDE)
    if magnitude is None:
        return None
    expected = shape_of(magnitude_axes(kernel), {"n": out}, (1,) * kernel)
    if tuple(magnitude.shape) != expected:
        raise AdapterError(
            f"{MAGNITUDE} {tuple(magnitude.shape)}, expected {expected} as lora_B has it"
        )
    return magnitude.flatten()


def lora_tensors(update: Update, has_bias: bool) -> dict[str, torch.Tensor]:
    """The tensors of one layer, by leaf: the reverse of `read_lora`.

    Args:
        update: of low rank, with no vector but a magnitude.
        has_bias: whether any layer of the adapter has a bias; one that has none gets zeros.
    """
    update = for_parameter(update)
    is_table = is_embedding(update.stored)
    first, second = (TABLE_DOWN, TABLE_UP) if is_table else (DOWN, UP)
    tensors = {first: update.down, second: up_beside(update.down, update.up)}
    if has_bias:
        zero = update.up.new_zeros(update.up.shape[0])
        tensors[UP_BIAS] = zero if update.bias is None else update.bias
    if update.magnitude is not None:
        tensors[MAGNITUDE] = magnitude_beside(update.down, update.magnitude)
    return tensors
