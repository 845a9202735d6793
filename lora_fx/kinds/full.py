"""A full difference of the weight, and of the bias: LyCORIS' ``full``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lora_fx.adapters.other_updates import WeightUpdate, added
from lora_fx.adapters.source_record import SourceRecord
from lora_fx.errors import AdapterError
from lora_fx.kinds.validation import layer_shape, measure, number, wide

_SHAPES: dict[str, tuple[str, ...]] = {"diff": ("out", "in", "*kernel"), "diff_b": ("out",)}
LEAVES = frozenset({*_SHAPES, "alpha"})


def read(tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> WeightUpdate:
    """Reads ``W + scale * diff`` and ``b + scale * diff_b``.

    Source: ``full`` of LyCORIS 4.1.

    Args:
        tensors: diff (out, in, *kernel); diff_b (out,) where the bias was trained too. ``alpha``
            is kept, and is no factor here.
        settings: ``scale``, 1 where it is not given; ``shape`` of the layer, if known.

    Returns:
        An expression in the weight, of kind ``"full"``, and a bias if there is one.

    Raises:
        AdapterError: a tensor is missing, not used or of another shape; a setting is wrong.
    """
    own = {leaf: tensor for leaf, tensor in tensors.items() if leaf != "alpha"}
    scale, layer = number(settings, "scale", 1.0), layer_shape(settings)
    measure(own, {leaf: _SHAPES[leaf] for leaf in ("diff", *own) if leaf in _SHAPES})
    diff, bias = own["diff"], own.get("diff_b")
    if layer is not None and tuple(diff.shape) != layer:
        raise AdapterError(f"diff is {tuple(diff.shape)}, the layer is {layer}")
    delta = diff if scale == 1 else wide(diff) * scale
    stored = SourceRecord(tensors, settings)
    shift = None if bias is None else wide(bias) * scale
    return WeightUpdate("full", added(delta), tuple(diff.shape), stored, shift)
