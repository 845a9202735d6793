"""A layer as updates see it: its type, shape, groups and dtype, of a graph or of an nn.Module."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer by its shape, whatever way it stores its weight.

    Attributes:
        path: path of the module.
        kind: ``"linear"``, ``"linear_transposed"`` (transformers' Conv1D), ``"embedding"``,
            ``"conv1d"``, ``"conv2d"`` or ``"conv3d"``.
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
    def is_linear(self) -> bool:
        """Whether it acts on the last axis of activations."""
        return self.kind in ("linear", "linear_transposed")

    @property
    def is_conv(self) -> bool:
        """Whether it is a convolution."""
        return self.kind.startswith("conv")

    @property
    def transposed(self) -> bool:
        """Whether W is stored as (in, out)."""
        return self.kind in ("linear_transposed", "embedding")

    @property
    def in_features(self) -> int:
        """Size of the axis of x that is summed over; of an embedding, how many rows it has."""
        return self.shape[1]

    @property
    def out_features(self) -> int:
        """Size of the same axis of the result."""
        return self.shape[0]


_CONVS = {nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d"}
NORM = "norm"


@dataclass(frozen=True)
class LayerClass:
    """A layer that an adapter can act on.

    Attributes:
        kind: as `lora_fx.sites.Site` has it: ``"linear"``, ``"linear_transposed"``,
            ``"embedding"``, ``"conv1d"``, ``"conv2d"``, ``"conv3d"``; or ``"norm"``.
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
        return self.kind in ("linear_transposed", "embedding")


def layer_class(module: nn.Module) -> LayerClass | None:
    """Tells a layer by its class; None for a module that is none, or of no known kind.

    A linear layer is ``nn.Linear``, or what is derived from it, or transformers' Conv1D, told
    without importing transformers. A norm is a module that is called one and has a weight.
    """
    if isinstance(module, nn.Linear):
        # Of loralib's layers, which store the weight as (in, out) if told to.
        turned = getattr(module, "fan_in_fan_out", False) is True
        shape = module.out_features, module.in_features
        return LayerClass("linear_transposed" if turned else "linear", shape)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return None
    if is_conv1d_of_transformers(module):
        return LayerClass("linear_transposed", (weight.shape[1], weight.shape[0]))
    if isinstance(module, nn.Embedding):
        return LayerClass("embedding", (module.embedding_dim, module.num_embeddings))
    conv = next((kind for cls, kind in _CONVS.items() if isinstance(module, cls)), None)
    if conv is not None:
        return LayerClass(conv, tuple(weight.shape), int(getattr(module, "groups", 1)))
    is_norm = "norm" in type(module).__name__.lower() and weight.ndim >= 1
    return LayerClass(NORM, tuple(weight.shape)) if is_norm else None


def is_conv1d_of_transformers(module: nn.Module) -> bool:
    """Whether a module is transformers' linear layer, whose weight is stored as (in, out)."""
    names = {(cls.__module__, cls.__name__) for cls in type(module).__mro__}
    return ("transformers.pytorch_utils", "Conv1D") in names
