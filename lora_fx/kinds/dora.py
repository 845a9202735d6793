"""DoRA: a magnitude beside an update of whatever kind, of the outputs or of the inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from lora_fx.adapters.other_updates import WeightUpdate, evaluated
from lora_fx.adapters.source_record import SourceRecord
from lora_fx.adapters.updates import AnyUpdate, Update
from lora_fx.algebra.matrix_expr import Matrix, constant, normed, reshaped, transposed
from lora_fx.errors import AdapterError

LEAVES = frozenset({"lora_magnitude_vector", "dora_scale"})


def split(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Divides the tensors of a layer into those of its kind and its magnitude, if there is one."""
    own = {leaf: tensor for leaf, tensor in tensors.items() if leaf not in LEAVES}
    return own, {leaf: tensor for leaf, tensor in tensors.items() if leaf in LEAVES}


def with_magnitude(update: AnyUpdate, tensors: Mapping[str, torch.Tensor]) -> AnyUpdate:
    """The update, with ``row = magnitude / norm(W')`` over it.

    Source: Liu et al., DoRA, arXiv:2402.09353, as PEFT and LyCORIS (``wd_on_out``) compute it.
    LyCORIS adds the dtype's eps to the norm, which no weight of a trained layer can tell.

    Args:
        update: without a magnitude.
        tensors: PEFT's ``lora_magnitude_vector``, (out,) or with axes of 1 around it, or LyCORIS'
            and kohya's ``dora_scale``, (out, 1, ...); or neither.

    Returns:
        An update with a magnitude; for an expression in the weight, one that ends with it.

    Raises:
        AdapterError: the magnitude is not one number an output, as in old LyCORIS files, which
            scale the inputs; both leaves are there; or the kind has no magnitude.
    """
    if not tensors:
        return update
    if len(tensors) > 1:
        raise AdapterError(f"{sorted(tensors)} beside kind {update.kind!r}, expected one")
    leaf, tensor = next(iter(tensors.items()))
    return update.with_magnitude(vector(leaf, tensor, update.shape[0]))


def vector(leaf: str, tensor: torch.Tensor, out: int | None) -> torch.Tensor:
    """A magnitude as (out,); refuses what is not one number an output."""
    found = tuple(tensor.shape)
    if leaf.endswith("dora_scale") and (tensor.ndim < 2 or found[0] != tensor.numel()):
        raise AdapterError(
            f"{leaf} is {found}, expected (out, 1, ...): one number an input "
            "(wd_on_out=False) is no factor of the outputs and is not supported; train with "
            "wd_on_out=True, or merge it where it was made"
        )
    if max(found, default=0) != tensor.numel() or (out is not None and tensor.numel() != out):
        raise AdapterError(f"{leaf} is {found}, expected ({out or 'out'},)")
    return tensor.reshape(-1)


def is_of_inputs(scale: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a ``dora_scale`` is (1, in, 1, ...) of a layer, and no (out, 1, ...)."""
    out, into, *kernel = shape
    return len(scale) != out and tuple(scale.shape) == (1, into, *[1] * len(kernel))


def over_inputs(
    update: AnyUpdate, tensors: Mapping[str, torch.Tensor], shape: tuple[int, ...]
) -> WeightUpdate:
    """``W'' = W' diag(magnitude / norm(W'))``, the norm of each input over all else.

    Source: ``weight_decompose`` of LyCORIS 4.1.3 with ``wd_on_out=False``; its older files are
    like this.

    Args:
        update: without a magnitude: W' is what it makes of W.
        tensors: all of the layer's, ``dora_scale`` among them.
        shape: (out, in, *kernel) of the layer.

    Raises:
        AdapterError: the kind has no magnitude.
    """
    if update.rank is None and not update.makes_anew:
        raise AdapterError(f"dora_scale stands beside kind {update.kind!r}")
    scale: object = update.stored_settings.get("scale", 1.0)
    if isinstance(update, Update):
        scale, update = update.scale, evaluated(update, shape, None)
    inner, magnitude = update.of, constant(tensors["dora_scale"].reshape(-1, 1))

    def outer(weight: Matrix) -> Matrix:
        columns = transposed(inner(weight))
        by_input = normed(magnitude, reshaped(columns, magnitude.shape[0]))
        return transposed(reshaped(by_input, columns.shape[0]))

    kind = "dora" if update.kind == "lora" else update.kind
    stored = SourceRecord(tensors, {"scale": scale, "writer": "lycoris"})
    return WeightUpdate(kind, outer, shape, stored)


def evaluated_first(
    update: Update, tensors: Mapping[str, torch.Tensor], shape: tuple[int, ...]
) -> AnyUpdate:
    """An update with a magnitude as a function of the weight: the one form beside groups.

    Args:
        update: of a grouped convolution.
        tensors: all of the layer's, ``dora_scale`` among them.
        shape: (out, in / groups, *kernel) of the layer.
    """
    stored = update.stored or SourceRecord(tensors, {"scale": update.scale})
    whole = evaluated(replace(update, magnitude=None), shape, stored)
    return with_magnitude(whole, {"dora_scale": tensors["dora_scale"]})
