"""LyCORIS' vectors: norms, its own (IA)3, and DoRA with one magnitude an input."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lora_fx.adapters.other_updates import Scaling, WeightUpdate, added, evaluated
from lora_fx.adapters.source_record import SourceRecord
from lora_fx.adapters.updates import AnyUpdate, Update
from lora_fx.algebra.matrix_expr import Matrix, constant, normed, reshaped, scaled, transposed
from lora_fx.errors import AdapterError
from lora_fx.layers.axes import shape_of
from lora_fx.layers.layer import Layer


def norm_update(leaf: str, change: torch.Tensor) -> tuple[str, AnyUpdate]:
    """What is added to a norm's weight or bias, as an update of that parameter.

    Source: ``lycoris/modules/norms.py`` of 4.1.3.

    Args:
        leaf: ``"w_norm"`` or ``"b_norm"``.
        change: (features,).

    Returns:
        The parameter's name, and its update.
    """
    name = {"w_norm": "weight", "b_norm": "bias"}[leaf]
    stored = SourceRecord({leaf: change})
    return name, WeightUpdate("norm", added(change), tuple(change.shape), stored)


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
    vector, stored = 1 + factors.to(wide).flatten(), SourceRecord(tensors)
    if on_input:
        return Scaling(col=vector, stored=stored)
    row = constant(vector.reshape(-1, 1))
    return WeightUpdate("ia3", lambda weight: scaled(row, weight), layer.own_shape, stored)


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
    if update.rank is None and not update.makes_anew:
        raise AdapterError(f"dora_scale stands beside kind {update.kind!r}")
    scale: object = 1.0 if update.stored is None else update.stored.settings.get("scale")
    if isinstance(update, Update):
        scale, update = update.scale, evaluated(update, layer.own_shape, None)
    inner, magnitude = update.of, constant(tensors["dora_scale"].reshape(-1, 1))

    def outer(weight: Matrix) -> Matrix:
        columns = transposed(inner(weight))
        by_input = normed(magnitude, reshaped(columns, magnitude.shape[0]))
        return transposed(reshaped(by_input, columns.shape[0]))

    kind = "dora" if update.kind == "lora" else update.kind
    stored = SourceRecord(tensors, {"scale": scale, "writer": "lycoris"})
    return WeightUpdate(kind, outer, layer.own_shape, stored)
