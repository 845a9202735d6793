"""DoRA with one magnitude an input, as LyCORIS has it with ``wd_on_output=False``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from lora_fx.adapters.other_updates import AnyUpdate, Scaling, WeightUpdate, added
from lora_fx.adapters.source_record import Stored
from lora_fx.adapters.updates import Update
from lora_fx.errors import AdapterError
from lora_fx.layers.axes import shape_of
from lora_fx.layers.layer import Layer

_aten = torch.ops.aten
Function = Callable[..., torch.Tensor]


def is_of_inputs(scale: torch.Tensor, layer: Layer) -> bool:
    """Whether a ``dora_scale`` is (1, in, 1, ...), and no (out, 1, ...) of the layer."""
    shape = tuple(scale.shape)
    if shape[:1] == layer.own_shape[:1]:
        return False
    return shape == shape_of("1 n 1*", {"n": layer.own_shape[1]}, layer.own_shape[2:])


def with_input_magnitude(
    update: AnyUpdate, tensors: Mapping[str, torch.Tensor], layer: Layer
) -> WeightUpdate:
    """``W'' = W' diag(magnitude / norm(W'))``, the norm of each input over all else.

    Source: ``weight_decompose`` of LyCORIS 4.1.3 with ``wd_on_out=False``; its older files are
    like this.

    Args:
        update: without a magnitude: W' is what it makes of W.
        tensors: all of the layer's, ``dora_scale`` among them.
        layer: as the base has it.

    Raises:
        AdapterError: the kind has no magnitude.
    """
    if isinstance(update, Scaling):
        raise AdapterError(f"dora_scale stands beside kind {update.kind!r}")
    values: tuple[torch.Tensor, ...]
    if isinstance(update, Update):
        function, values = added, (update.delta().reshape(layer.own_shape),)
        scale: object = update.scale
    else:
        function, values = update.function, update.values
        scale = update.stored.settings["scale"] if update.stored else 1.0
    magnitude, kind = tensors["dora_scale"].flatten(), update.kind
    kind = "dora" if kind == "lora" else kind
    stored = Stored(tensors, {"scale": scale, "writer": "lycoris"})
    normed = _normed(function, layer.own_shape)
    return WeightUpdate(kind, normed, (magnitude, *values), layer.own_shape, stored)


def _normed(function: Function, shape: tuple[int, ...]) -> Function:
    """What a function gives, each column at the length that the first value says."""
    turned = (shape[1], shape[0], *shape[2:])

    def normed(
        weight: torch.Tensor, magnitude: torch.Tensor, *values: torch.Tensor
    ) -> torch.Tensor:
        columns = _aten.transpose.int(function(weight, *values), 0, 1)
        flat = _aten.reshape.default(columns, [shape[1], -1])
        norm = _aten.linalg_vector_norm.default(flat, 2, [1], True)
        gain = _aten.div.Tensor(_aten.unsqueeze.default(magnitude, 1), norm)
        scaled = _aten.reshape.default(_aten.mul.Tensor(flat, gain), list(turned))
        result: torch.Tensor = _aten.transpose.int(scaled, 0, 1)
        return result

    return normed
