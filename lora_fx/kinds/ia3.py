"""(IA)3: one learned factor for each output, or for each input of a feed-forward layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lora_fx.adapters.other_updates import Scaling
from lora_fx.adapters.source_record import SourceRecord
from lora_fx.adapters.updates import AnyUpdate
from lora_fx.errors import AdapterError
from lora_fx.kinds.validation import flag, layer_shape, measure

LEAVES = frozenset({"ia3_l"})


def read(tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> AnyUpdate:
    """Reads ``diag(l) W``, bias scaled too, or ``W diag(l)`` for a feed-forward layer.

    Source: Liu et al., arXiv:2205.05638; ``ia3`` of PEFT 0.21.

    Args:
        tensors: ia3_l, (out, 1), feed-forward (1, in); of a convolution (1, n, 1, ...) either way.
        settings: ``feedforward``: whether the layer is one of the config's feedforward_modules;
            ``shape`` of the layer, if known.

    Raises:
        AdapterError: the tensor is missing or of another shape; a setting is wrong.
    """
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
