"""The keys of a loralib file: an adapter's alone, or those of a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from lora_fx.errors import AdapterError, shorten
from lora_fx.formats.pairs import DOWN, UP, Layers, add, check_pairs
from lora_fx.layers.base_layers import BaseLayers

ROLES = {".lora_A": DOWN, ".lora_B": UP}
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


def sort_keys(tensors: Mapping[str, torch.Tensor], base: BaseLayers) -> LoralibFile:
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
    file, others = LoralibFile(), dict[str, torch.Tensor]()
    for key, tensor in tensors.items():
        end = next((end for end in ROLES if key.endswith(end)), None)
        if end is not None and key != end:
            add(file.layers, key.removesuffix(end), ROLES[end], key, tensor)
        else:
            others[key] = tensor
    check_pairs(file.layers)
    named = {_outer(key, file.layers): tensor for key, tensor in others.items()}
    file.weights = {m: named[m + WEIGHT] for m in file.layers if m + WEIGHT in named}
    is_whole = file.weights.keys() == file.layers.keys()
    rest = {key: t for key, t in named.items() if key.removesuffix(WEIGHT) not in file.weights}
    known = (BIAS, "") if is_whole else (BIAS,)
    unused = [key for key in rest if "lora_" in key.rpartition(".")[2] or not key.endswith(known)]
    unused += [] if is_whole else [module + WEIGHT for module in file.weights]
    if unused:
        raise AdapterError(
            f"{len(unused)} tensors are no part of an adapter: {shorten(unused)}; expected "
            "<module>.lora_A, <module>.lora_B and biases, as loralib.lora_state_dict(model) gives, "
            "or the whole model.state_dict()"
        )
    file.replacements = {k: t for k, t in rest.items() if not (is_whole and _same(base, k, t))}
    return file


def _outer(key: str, layers: Mapping[str, object]) -> str:
    """The name of a convolution's parameter in the base."""
    owner, _, leaf = key.rpartition(".")
    module = owner.removesuffix(INNER)
    return f"{module}.{leaf}" if owner != module and module in layers else key


def _same(base: BaseLayers, key: str, tensor: torch.Tensor) -> bool:
    """Whether the base has this tensor, as far as the file's dtype tells."""
    own = base.parameter(key)
    return own is not None and own.shape == tensor.shape and torch.equal(own.to(tensor), tensor)
