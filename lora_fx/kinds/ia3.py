"""(IA)3: one learned factor for each output, or for each input of a feed-forward layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lora_fx.adapters.other_updates import Scaling, WeightUpdate
from lora_fx.adapters.source_record import SourceRecord
from lora_fx.adapters.updates import AnyUpdate
from lora_fx.algebra.matrix_expr import constant, scaled
from lora_fx.errors import AdapterError
from lora_fx.kinds.validation import flag, layer_shape, measure
from lora_fx.numerics import widened

LYCORIS = frozenset({"weight", "on_input"})
LEAVES = LYCORIS | {"ia3_l"}


def read(tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> AnyUpdate:
    """Reads ``diag(l) W``, bias scaled too, or ``W diag(l)`` for a feed-forward layer.

    LyCORIS has ``1 + weight`` in place of l, and leaves the bias as it is.
    Source: Liu et al., arXiv:2205.05638; ``ia3`` of PEFT 0.21, ``modules/ia3.py`` of LyCORIS 4.1.3.

    Args:
        tensors: ia3_l, (out, 1), feed-forward (1, in); of a convolution (1, n, 1, ...) either way.
            Or LyCORIS' weight, (n,) or with axes of 1 around it, and on_input, one number.
        settings: ``feedforward``: whether the layer is one of the config's feedforward_modules,
            for ia3_l; ``shape`` of the layer, if known, and for weight.

    Raises:
        AdapterError: the tensor is missing or of another shape; a setting is wrong.
    """
    if "ia3_l" not in tensors and LYCORIS & tensors.keys():
        return _of_lycoris(tensors, layer_shape(settings) or ())
    is_input = flag(settings, "feedforward")
    measure(tensors, {"ia3_l": ("one", "n", "*ones")})
    factors, layer = tensors["ia3_l"], layer_shape(settings)
    axis = 1 if is_input or factors.ndim > 2 else 0
    if factors.shape[axis] != factors.numel():
        wanted = "(1, in)" if is_input else "(out, 1)"
        said = f"feedforward is {str(is_input).lower()}"
        raise AdapterError(
            f"ia3_l is {tuple(factors.shape)} and {said}: expected {wanted}, or "
            "(1, n, 1, ...) of a convolution"
        )
    # A grouped convolution reads more channels than one of its outputs sees.
    grouped = is_input and len(layer or ()) > 2 and layer and factors.numel() % layer[1] == 0
    if layer is not None and layer[is_input] != factors.numel() and not grouped:
        raise AdapterError(f"ia3_l has {factors.numel()} factors, the layer is {layer}")
    vector, stored = factors.reshape(-1), SourceRecord(tensors, settings)
    return Scaling(col=vector, stored=stored) if is_input else Scaling(row=vector, stored=stored)


def _of_lycoris(tensors: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> AnyUpdate:
    """``W * (1 + weight)`` along the outputs or the inputs of a layer of this shape."""
    factors, side = tensors.get("weight"), tensors.get("on_input")
    if factors is None or side is None or side.numel() != 1:
        raise AdapterError(f"{sorted(tensors)}, expected weight, and on_input of one number")
    on_input = bool(side.item())
    size = shape[int(on_input)]
    if max(factors.shape, default=0) != factors.numel() or factors.numel() != size:
        raise AdapterError(f"weight is {tuple(factors.shape)}, expected ({size},)")
    vector, stored = 1 + widened(factors).flatten(), SourceRecord(tensors)
    if on_input:
        return Scaling(col=vector, stored=stored)
    row = constant(vector.reshape(-1, 1))
    return WeightUpdate("ia3", lambda weight: scaled(row, weight), shape, stored)
