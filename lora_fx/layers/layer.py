"""What an update needs to know of a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
