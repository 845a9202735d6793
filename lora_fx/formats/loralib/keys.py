"""The keys of a loralib file: an adapter's alone, or those of a whole model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.errors import AdapterError, AdapterWarning
from lora_fx.formats.dialects import Dialect, Tensors, sort_keys
from lora_fx.formats.layer_tensors import DOWN, UP, Layers, check_pairs
from lora_fx.layers.base_layers import BaseLayers

DIALECT = Dialect(
    {".lora_A": DOWN, ".lora_B": UP},
    "<module>.lora_A, <module>.lora_B and biases, as loralib.lora_state_dict(model) gives, or the "
    "whole model.state_dict()",
)
WEIGHT, BIAS = ".weight", ".bias"
# loralib's convolutions hold torch's as a child of this name.
INNER = ".conv"


@dataclass
class LoralibFile:
    """The tensors of a file by use.

    Attributes:
        layers: path of an adapted layer -> its pair.
        weights: path of an adapted layer -> its weight, of a whole state dict.
        replacements: parameter path -> tensor that takes its place.
    """

    layers: Layers = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    replacements: dict[str, torch.Tensor] = field(default_factory=dict)


def sort_loralib(tensors: Tensors, base: BaseLayers) -> LoralibFile:
    """Sorts every tensor of a file to its use.

    loralib freezes the weights that it adapts, so those of a whole state dict are the base's and
    tell shapes alone. Its other tensors may have been trained: they replace the base's, but where
    the base is given and has the same.

    Args:
        tensors: by key.
        base: the layers of the model or graph, if it is given.

    Raises:
        AdapterError: a key without a use, or half of a pair.
    """
    file = LoralibFile()
    file.layers = sort_keys(tensors, DIALECT, partial(_claim, file, base))
    return file


def _claim(file: LoralibFile, base: BaseLayers, others: Tensors, layers: Layers) -> list[str]:
    """Files weights and replaced tensors; what is left has no use."""
    check_pairs(layers)
    named = {_outer(key, layers): tensor for key, tensor in others.items()}
    file.weights = {m: named[m + WEIGHT] for m in layers if m + WEIGHT in named}
    is_whole = file.weights.keys() == layers.keys()
    rest = {key: t for key, t in named.items() if key.removesuffix(WEIGHT) not in file.weights}
    file.replacements = {k: t for k, t in rest.items() if not (is_whole and _same(base, k, t))}
    known = (BIAS, "") if is_whole else (BIAS,)
    unused = [key for key in rest if "lora_" in key.rpartition(".")[2] or not key.endswith(known)]
    return unused + ([] if is_whole else [module + WEIGHT for module in file.weights])


def _outer(key: str, layers: Mapping[str, object]) -> str:
    """The name of a convolution's parameter in the base."""
    owner, _, leaf = key.rpartition(".")
    module = owner.removesuffix(INNER)
    return f"{module}.{leaf}" if owner != module and module in layers else key


def _same(base: BaseLayers, key: str, tensor: torch.Tensor) -> bool:
    """Whether the base has this tensor, as far as the file's dtype tells."""
    own = base.parameter(key)
    return own is not None and own.shape == tensor.shape and torch.equal(own.to(tensor), tensor)


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
