"""Where an adapter goes into a swappable model: the inputs of one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from lora_fx.layers.layer import Layer


class Input(NamedTuple):
    """A graph input of a slot.

    Attributes:
        name: ``<module path>.lora_A`` and its kin.
        shape: None where the rank goes.
    """

    name: str
    shape: tuple[int | None, ...]

    def sized(self, rank: int) -> tuple[int, ...]:
        """The shape at a rank."""
        return tuple(rank if size is None else size for size in self.shape)


@dataclass(frozen=True)
class Slot:
    """One layer that an adapter can act on.

    Attributes:
        path: module path of the layer.
        kind: of the layer, as `lora_fx.sites.Layer` says.
        in_features: that A sums over; of an embedding, how many rows it has.
        out_features: that B gives.
        dtype: of what goes in: ``"float32"``.
        kernel: of a convolution, else empty.
        vectors: whether it takes those of DoRA and (IA)3 as well.
        digest: of the weight that the slot stands beside, its dtype, shape and bytes.
        bias_digest: of the layer's bias, or ``""``.
    """

    path: str
    kind: str
    in_features: int
    out_features: int
    dtype: str
    kernel: tuple[int, ...] = ()
    vectors: bool = False
    digest: str = ""
    bias_digest: str = ""

    @property
    def layer(self) -> Layer:
        """What an update needs to know of it."""
        shape = (self.out_features, self.in_features, *self.kernel)
        return Layer(path=self.path, kind=self.kind, shape=shape, dtype=getattr(torch, self.dtype))

    @property
    def inputs(self) -> dict[str, Input]:
        """The graph inputs, by the names of `lora_fx.terms.Terms`: A, B, and vectors if any."""
        out, into, points = self.out_features, self.in_features, (1,) * len(self.kernel)
        is_conv = bool(self.kernel)
        found = {
            "down": ("A", (None, into, *self.kernel) if is_conv else (into, None)),
            "up": ("B", (out, None, *points) if is_conv else (None, out)),
        }
        if self.vectors:
            found |= {"gain": ("gain", (out, *points)), "bias": ("bias", (out, *points))}
        if self.vectors and self.kind != "embedding":
            found["col"] = ("col", (into, *points))
        return {part: Input(f"{self.path}.lora_{n}", shape) for part, (n, shape) in found.items()}

    @property
    def names(self) -> list[str]:
        """The names of its graph inputs."""
        return [value.name for value in self.inputs.values()]

    def neutral(self) -> dict[str, torch.Tensor]:
        """What has no effect, by input name: no rank, gains and biases of zero, columns of one.

        A convolution gets zeros of rank 1: there are versions of onnxruntime (1.31) whose
        convolutions leave the result of no channels as the memory was.
        """
        dtype, rank = self.layer.dtype, 1 if self.kernel else 0
        make = {"col": torch.ones}
        return {
            value.name: make.get(part, torch.zeros)(value.sized(rank), dtype=dtype)
            for part, value in self.inputs.items()
        }
