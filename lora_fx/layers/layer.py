"""A layer as updates see it: its type, shape, groups and dtype, of a graph or of an nn.Module."""

from __future__ import annotations

from dataclasses import dataclass, field
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
            Conv1D), ``"embedding"``, ``"conv2d"``, ``"conv_transpose2d"``, ...; ``"norm"``; or
            ``""`` of another module that has a weight.
        shape: (out, in, *kernel), whatever way W is stored; in is that of x, however many groups.
            Of what is no matrix the weight's own.
        dtype: of W.
        groups: of a convolution.
        name: what messages call it: its class, or its operator.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    groups: int = 1
    name: str = field(default="", compare=False)

    @property
    def type(self) -> LayerType:
        """What is known of its kind, if it is a matrix."""
        return TYPES[self.kind]

    @property
    def is_matrix(self) -> bool:
        """Whether it has an input and an output side."""
        return self.kind in TYPES

    @property
    def in_files(self) -> bool:
        """Whether it is of a type that files of adapters have updates of."""
        return self.kind == NORM or (self.is_matrix and self.type.in_files)

    @property
    def is_linear(self) -> bool:
        """Whether it acts on the last axis of activations."""
        return self.is_matrix and self.type.is_linear

    @property
    def is_conv(self) -> bool:
        """Whether it has a kernel."""
        return self.is_matrix and self.type.kernel > 0

    @property
    def is_table(self) -> bool:
        """Whether it looks up rows: an embedding."""
        return self.is_matrix and self.type.reads_ids

    @property
    def transposed(self) -> bool:
        """Whether W is stored as (in, out), or (in, out / groups, *kernel)."""
        return self.is_matrix and self.type.transposed

    @property
    def own_shape(self) -> tuple[int, ...]:
        """(out, in / groups, *kernel): each output of a grouped convolution sees one group."""
        if not self.is_matrix:
            return self.shape
        out, into, *kernel = self.shape
        return out, into // self.groups, *kernel

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of W, as it is stored."""
        return self.type.canonical_shape(self.own_shape, self.groups)

    @property
    def in_features(self) -> int:
        """Size of the axis of x that is summed over; of an embedding, how many rows it has."""
        return self.shape[1]

    @property
    def out_features(self) -> int:
        """Size of the same axis of the result."""
        return self.shape[0]


def layer_of(module: nn.Module, path: str = "") -> Layer | None:
    """Tells a layer by its class; None for a module that is none, or of no known kind.

    A linear layer is ``nn.Linear``, or what is derived from it, or transformers' Conv1D, told
    without importing transformers. A norm is a module that is called one and has a weight.
    """
    found, weight = _type_of(module), getattr(module, "weight", None)
    name, dtype = type(module).__name__, getattr(weight, "dtype", torch.float32)
    if found is not None and found.is_linear and hasattr(module, "out_features"):
        shape: Any = module.out_features, module.in_features
        return Layer(path=path, kind=found.name, shape=shape, dtype=dtype, name=name)
    if not isinstance(weight, nn.Parameter):
        return None
    if found is None:
        is_norm, shape = "norm" in name.lower() and weight.ndim >= 1, tuple(weight.shape)
        return Layer(path=path, kind=NORM, shape=shape, dtype=dtype, name=name) if is_norm else None
    groups = int(getattr(module, "groups", 1)) if found.kernel else 1
    out, into, *kernel = found.canonical_shape(tuple(weight.shape), groups)
    shape = out, into * groups, *kernel
    return Layer(path=path, kind=found.name, shape=shape, dtype=dtype, groups=groups, name=name)


def _type_of(module: nn.Module) -> LayerType | None:
    if is_conv1d_of_transformers(module):
        return TYPES["linear_transposed"]
    known = reversed(TYPES.values())  # what was registered last may be derived from another
    found = next((layer for layer in known if isinstance(module, layer.classes)), None)
    # Of loralib's layers, which store the weight as (in, out) if told to.
    turned = found is TYPES["linear"] and getattr(module, "fan_in_fan_out", False) is True
    return TYPES["linear_transposed"] if turned else found


def is_conv1d_of_transformers(module: nn.Module) -> bool:
    """Whether a module is transformers' linear layer, whose weight is stored as (in, out)."""
    return any(map(is_conv1d, type(module).__mro__))


def is_conv1d(cls: type) -> bool:
    """Whether a class is that of transformers' linear layer itself."""
    return (cls.__module__, cls.__name__) == ("transformers.pytorch_utils", "Conv1D")
