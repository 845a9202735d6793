"""The weights that a whole loralib state dict holds, against those of the base."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.errors import AdapterError, AdapterWarning
from lora_fx.formats.loralib_file import WEIGHT
from lora_fx.layers.base_layers import BaseLayers


def check_base(
    path: Path,
    module: str,
    update: AnyUpdate,
    weight: torch.Tensor,
    layer: tuple[int, ...],
    base: BaseLayers,
    strict: bool,
) -> None:
    """Refuses, or with ``strict=False`` warns of, an adapted weight that is not the base's.

    It may be as it was, or with the update merged into it, as loralib does in evaluation mode, and
    either way round.

    Args:
        path: the file.
        module: path of the layer.
        update: of the layer.
        weight: as the file has it.
        layer: (out, in / groups, *kernel).
        base: what has the weight.
        strict: refuse it.

    Raises:
        AdapterError: it is neither, and ``strict`` is set.
    """
    own = base.parameter(module + WEIGHT)
    if own is None:
        return
    wide = torch.promote_types(own.dtype, torch.float32)
    forms = [own.to(wide), own.to(wide).T] if own.ndim == 2 else [own.to(wide)]
    known = [f for whole in forms if whole.shape == layer for f in (whole, update.weight(whole))]
    turned = [t.T for t in known if t.ndim == 2]
    tolerance = 16 * max(torch.finfo(weight.dtype).eps, torch.finfo(own.dtype).eps)
    if any(t.shape == weight.shape and _near(weight, t, tolerance) for t in known + turned):
        return
    message = (
        f"{path}: {module}{WEIGHT} is neither the base's nor that with this update merged into it; "
        "give the base that the adapter was trained on"
    )
    if strict:
        raise AdapterError(f"{message}, or pass strict=False to leave the weight out")
    warnings.warn(message, AdapterWarning, stacklevel=4)


def _near(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    gap = torch.linalg.vector_norm(one.to(other.dtype) - other)
    return bool(gap <= tolerance * torch.linalg.vector_norm(other))
