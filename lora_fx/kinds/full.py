"""A full difference of the weight, and of the bias: LyCORIS' ``full``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from lora_fx.adapters.other_updates import WeightUpdate, added
from lora_fx.adapters.source_record import SourceRecord, is_embedding
from lora_fx.adapters.updates import AnyUpdate, Update
from lora_fx.algebra.matrix_expr import Matrix, Sum, constant
from lora_fx.errors import AdapterError
from lora_fx.kinds.validation import layer_shape, measure, number
from lora_fx.numerics import widened

_SHAPES: dict[str, tuple[str, ...]] = {"diff": ("out", "in", "*kernel"), "diff_b": ("out",)}
LEAVES = frozenset({*_SHAPES, "alpha"})


def read(tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> WeightUpdate:
    """Reads ``W + scale * diff`` and ``b + scale * diff_b``.

    Source: ``full`` of LyCORIS 4.1; of tables ``FullModule`` of ai-toolkit.

    Args:
        tensors: diff (out, in, *kernel), of a table (num, dim) as it is stored; diff_b (out,) where
            the bias was trained too. ``alpha`` is kept, and is no factor here.
        settings: ``scale``, 1 where it is not given; ``shape`` of the layer, if known; ``layer``,
            ``"embedding"`` of a table.

    Returns:
        An expression in the weight, of kind ``"full"``, and a bias if there is one.

    Raises:
        AdapterError: a tensor is missing, not used or of another shape; a setting is wrong.
    """
    own = {leaf: tensor for leaf, tensor in tensors.items() if leaf != "alpha"}
    scale, layer = number(settings, "scale", 1.0), layer_shape(settings)
    measure(own, {leaf: _SHAPES[leaf] for leaf in ("diff", *own) if leaf in _SHAPES})
    stored, bias = SourceRecord(tensors, settings), own.get("diff_b")
    diff = own["diff"].T if is_embedding(stored) else own["diff"]
    if layer is not None and tuple(diff.shape) != layer:
        raise AdapterError(f"diff is {tuple(diff.shape)}, the layer is {layer}")
    delta = diff if scale == 1 else widened(diff) * scale
    shift = None if bias is None else widened(bias) * scale
    return WeightUpdate("full", added(delta), tuple(diff.shape), stored, shift)


def of_vector(leaf: str, change: torch.Tensor) -> WeightUpdate:
    """Reads ``v + change``, of a norm's weight or of a bias: ``norms.py`` of LyCORIS 4.1.3."""
    return WeightUpdate("norm", added(change), tuple(change.shape), SourceRecord({leaf: change}))


def beside(update: AnyUpdate, diff: torch.Tensor | None, shift: torch.Tensor | None) -> AnyUpdate:
    """An update of another kind, and ``diff`` added to its weight, ``shift`` to its bias."""
    own = update.shift(lambda: None)
    bias = own if shift is None else shift if own is None else own + shift
    if diff is None and isinstance(update, Update) and update.scale != 0:
        dtype = torch.promote_types(update.up.dtype, torch.float32)
        return replace(update, bias=None if bias is None else bias.to(dtype) / update.scale)

    def function(weight: Matrix) -> Matrix:
        whole = update.of(weight)
        return whole if diff is None else Sum(whole, constant(diff, weight.shape))

    shape = update.shape if diff is None else tuple(diff.shape)
    return WeightUpdate("full", function, shape, bias=bias)
