"""A layer as updates see it: its type, shape, groups and dtype, of a graph or of an nn.Module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_fx.layers.layer_types import NORM, TYPES, LayerType


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer by its shape, whatever way it stores its weight.

    Attributes:
        path: path of the module.
        kind: the name of its `LayerType`: ``"linear"``, ``"linear_transposed"`` (transformers'
            Conv1D), ``"embedding"``, ``"conv2d"``, ``"conv_transpose2d"``, ...
        shape: (out, in, *kernel), whatever way W is stored; in is that of x, however many groups.
        dtype: of W.
        groups: of a convolution.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    groups: int = 1

    @property
    def type(self) -> LayerType:
        """What is known of its kind."""
        return TYPES[self.kind]

    @property
    def is_linear(self) -> bool:
        """Whether it acts on the last axis of activations."""
        return self.type.is_linear

    @property
    def is_conv(self) -> bool:
        """Whether it has a kernel."""
        return self.type.kernel > 0

    @property
    def transposed(self) -> bool:
        """Whether W is stored as (in, out), or (in, out / groups, *kernel)."""
        return self.type.transposed

    @property
    def own_shape(self) -> tuple[int, ...]:
        """(out, in / groups, *kernel): each output of a grouped convolution sees one group."""
        out, into, *kernel = self.shape
        return out, into // self.groups, *kernel

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of W, as it is stored."""
        return self.type.stored_shape(self.own_shape, self.groups)

    @property
    def in_features(self) -> int:
        """Size of the axis of x that is summed over; of an embedding, how many rows it has."""
        return self.shape[1]

    @property
    def out_features(self) -> int:
        """Size of the same axis of the result."""
        return self.shape[0]


@dataclass(frozen=True)
class LayerClass:
    """A layer that an adapter can act on.

    Attributes:
        kind: the name of a `LayerType`, or ``"norm"``.
        shape: (out, in / groups, *kernel) of the weight, whatever way it is stored: an embedding
            of (num, dim) is (dim, num); of a norm the weight's own.
        groups: of a convolution.
    """

    kind: str
    shape: tuple[int, ...]
    groups: int = 1

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored with its first two axes the other way round."""
        return self.kind in TYPES and TYPES[self.kind].transposed


def layer_class(module: nn.Module) -> LayerClass | None:
    """Tells a layer by its class; None for a module that is none, or of no known kind.

    A linear layer is ``nn.Linear``, or what is derived from it, or transformers' Conv1D, told
    without importing transformers. A norm is a module that is called one and has a weight.
    """
    known = reversed(TYPES.values())  # what was registered last may be derived from another
    found = next((layer for layer in known if isinstance(module, layer.classes)), None)
    if found is TYPES["linear"]:
        # Of loralib's layers, which store the weight as (in, out) if told to.
        turned = getattr(module, "fan_in_fan_out", False) is True
        shape: Any = module.out_features, module.in_features
        return LayerClass("linear_transposed" if turned else "linear", shape)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return None
    if is_conv1d_of_transformers(module):
        found = TYPES["linear_transposed"]
    if found is not None:
        groups = int(getattr(module, "groups", 1)) if found.kernel else 1
        shape = found.canonical_shape(tuple(weight.shape), groups)
        return LayerClass(found.name, shape, groups)
    is_norm = "norm" in type(module).__name__.lower() and weight.ndim >= 1
    return LayerClass(NORM, tuple(weight.shape)) if is_norm else None


def is_conv1d_of_transformers(module: nn.Module) -> bool:
    """Whether a module is transformers' linear layer, whose weight is stored as (in, out)."""
    names = {(cls.__module__, cls.__name__) for cls in type(module).__mro__}
    return ("transformers.pytorch_utils", "Conv1D") in names
