"""A full difference of the weight, and of the bias: LyCORIS' ``full``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from lora_fx.errors import AdapterError
from lora_fx.kinds.shapes import layer_shape, measure, number, wide
from lora_fx.other_updates import AnyUpdate, WeightUpdate
from lora_fx.stored import Stored
from lora_fx.update import Update

_SHAPES: dict[str, tuple[str, ...]] = {"diff": ("out", "in", "*kernel"), "diff_b": ("out",)}
MARKS = frozenset({"diff"})
LEAVES = frozenset({*_SHAPES, "alpha"})


def read(where: str, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> AnyUpdate:
    """Reads ``W + scale * diff`` and ``b + scale * diff_b``.

    Source: ``full`` of LyCORIS 4.1.

    Args:
        where: file and layer, for messages.
        tensors: diff (out, in, *kernel); diff_b (out,) where the bias was trained too. ``alpha``
            is kept, and is no factor here.
        settings: ``scale``, 1 where it is not given; ``shape`` of the layer, if known.

    Returns:
        A function of the weight, of kind ``"full"``. With a ``diff_b`` that is not zero, the same
        as a product with an identity, because a bias needs an ``Update`` to ride on.

    Raises:
        AdapterError: a tensor is missing, not used or of another shape; a setting is wrong.
    """
    own = {leaf: tensor for leaf, tensor in tensors.items() if leaf != "alpha"}
    scale, layer = number(where, settings, "scale", 1.0), layer_shape(where, settings)
    measure(where, own, {leaf: _SHAPES[leaf] for leaf in ("diff", *own) if leaf in _SHAPES})
    diff, bias = own["diff"], own.get("diff_b")
    if layer is not None and tuple(diff.shape) != layer:
        raise AdapterError(f"{where}: diff is {tuple(diff.shape)}, the layer is {layer}")
    stored = Stored(tensors, settings)
    if bias is not None and bool(bias.any()):
        down, up = _product(diff)
        return Update(down, up, scale, kind="full", bias=bias, stored=stored)
    delta = diff if scale == 1 else wide(diff) * scale
    return WeightUpdate("full", _added, (delta,), tuple(diff.shape), stored)


def _product(diff: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Down and up whose product is exactly this, one of them the smaller identity."""
    out, columns = len(diff), math.prod(diff.shape[1:])
    eye = torch.eye(min(out, columns), dtype=diff.dtype, device=diff.device)
    if out <= columns:
        return diff, eye
    return eye.reshape(columns, *diff.shape[1:]), diff.flatten(1)


def _added(weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = torch.ops.aten.add.Tensor(weight, delta)
    return result
