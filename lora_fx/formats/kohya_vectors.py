"""LyCORIS' vectors: what is added to a norm, and its own (IA)3."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lora_fx.adapters.other_updates import Scaling, WeightUpdate, added
from lora_fx.adapters.source_record import Stored
from lora_fx.adapters.updates import AnyUpdate
from lora_fx.algebra.matrix_expr import constant, scaled
from lora_fx.errors import AdapterError
from lora_fx.layers.layer import Layer


def norm_update(path: str, leaf: str, change: torch.Tensor) -> tuple[str, AnyUpdate]:
    """What is added to a norm's weight or bias, as an update of that parameter.

    Source: ``lycoris/modules/norms.py`` of 4.1.3.

    Args:
        path: of the norm.
        leaf: ``"w_norm"`` or ``"b_norm"``.
        change: (features,).

    Returns:
        The parameter's path, and its update.
    """
    name = {"w_norm": "weight", "b_norm": "bias"}[leaf]
    stored = Stored({leaf: change})
    return f"{path}.{name}", WeightUpdate("norm", added(change), tuple(change.shape), stored)


def ia3_update(tensors: Mapping[str, torch.Tensor], layer: Layer) -> AnyUpdate:
    """``W * (1 + weight)`` along inputs or outputs; LyCORIS' (IA)3 leaves the bias as it is.

    Source: ``lycoris/modules/ia3.py`` of 4.1.3.

    Args:
        tensors: weight, (features,) or with axes of 1 around it, and on_input, one number.
        layer: as the base has it.

    Raises:
        AdapterError: one of the two is missing, or of another shape.
    """
    factors, side = tensors.get("weight"), tensors.get("on_input")
    if factors is None or side is None or side.numel() != 1:
        raise AdapterError(f"{sorted(tensors)}, expected weight, and on_input of one number")
    on_input = bool(side.item())
    size = layer.own_shape[int(on_input)]
    if max(factors.shape, default=0) != factors.numel() or factors.numel() != size:
        raise AdapterError(f"weight is {tuple(factors.shape)}, expected ({size},)")
    wide = torch.promote_types(factors.dtype, torch.float32)
    vector, stored = 1 + factors.to(wide).flatten(), Stored(tensors)
    if on_input:
        return Scaling(col=vector, stored=stored)
    row = constant(vector.reshape(-1, 1))
    return WeightUpdate("ia3", lambda weight: scaled(row, weight), layer.own_shape, stored)
