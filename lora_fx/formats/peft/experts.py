"""LoRA on a parameter that holds one matrix for each expert, as PEFT packs it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lora_fx.adapters.other_updates import WeightUpdate, added_to_each
from lora_fx.adapters.parameter_updates import DOWN, TURNED_EXPERTS, UP
from lora_fx.adapters.source_record import SourceRecord
from lora_fx.errors import AdapterError
from lora_fx.formats.peft.wrappers import WrappedTarget
from lora_fx.layers.base_layers import BaseLayers

Tensors = Mapping[str, torch.Tensor]


def read_experts(
    place: WrappedTarget,
    tensors: Tensors,
    rank: int,
    scale: float,
    use_rslora: bool,
    base: BaseLayers,
) -> WeightUpdate:
    """Reads ``W[e] + scale * up[e] @ down[e]`` for every expert e, W as the layer stores it.

    ``lora_A`` (r * experts, in) has the experts one after the other, ``lora_B``
    (out, r * experts) their columns of one rank next to each other: ``ParamWrapper`` of PEFT 0.21.

    The parameter is (experts, out, in), or (experts, in, out); the base tells which.
    """
    if sorted(tensors) != [DOWN, UP]:
        raise AdapterError(f"has {sorted(tensors)}, expected {DOWN} and {UP} of experts")
    shape = place.shape
    if shape is None:
        raise AdapterError(
            f"{DOWN} {tuple(tensors[DOWN].shape)} is of several experts at rank {rank}, "
            "whose orientation the file does not say; pass base=, the model"
        )
    count, rows, columns = shape
    transposed = _is_transposed(place, tensors, base)
    out, into = (columns, rows) if transposed else (rows, columns)
    expected = (rank * count, into), (out, rank * count)
    found = tuple(tensors[DOWN].shape), tuple(tensors[UP].shape)
    if found != expected:
        raise AdapterError(
            f"lora_A and lora_B are {found}, expected {expected} for rank {rank} and "
            f"{place.parameter} {shape}"
        )
    wide = torch.promote_types(tensors[DOWN].dtype, torch.float32)
    down = tensors[DOWN].to(wide).reshape(count, rank, into)
    up = tensors[UP].to(wide).reshape(out, rank, count).permute(2, 0, 1) * scale
    left, right = (down.transpose(1, 2), up.transpose(1, 2)) if transposed else (up, down)
    settings = {
        "parameter": place.parameter, "depth": place.depth, "r": rank, "scale": scale,
        "use_rslora": use_rslora, TURNED_EXPERTS: transposed,
    }  # fmt: skip
    kind, stored = "rslora" if use_rslora else "lora", SourceRecord(tensors, settings)
    return WeightUpdate(kind, added_to_each(left.contiguous(), right.contiguous()), shape, stored)


def _is_transposed(place: WrappedTarget, tensors: Tensors, base: BaseLayers) -> bool:
    """Whether each expert is (in, out): what the module says, else what the shapes do."""
    assert place.shape is not None
    assert base.base is not None
    try:
        module = base.base.get_submodule(place.module)
    except AttributeError:
        module = base.base
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    if not base.is_graph:
        return False
    _, rows, columns = place.shape
    if rows == columns:
        raise AdapterError(
            f"each of the experts is {rows} by {columns}, and a graph does not say which "
            "of the two is the input; pass base=, the model itself"
        )
    return tuple(tensors[DOWN].shape[1:]) == (rows,)
