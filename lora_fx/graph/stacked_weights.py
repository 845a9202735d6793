"""Constants that a form of a branch reads: weights put beside each other, computed when read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lora_fx.graph.lazy_tensor import LazyTensor, TensorSnapshot

Make = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Factors:
    """What one layer's branches add: ``(x A) B + bias``, the sum of all of them.

    Attributes:
        downs: each (in, r).
        ups: each (r, out), with its scale.
        biases: each (out,): the layer's own and the branches'.
    """

    downs: tuple[TensorSnapshot, ...]
    ups: tuple[tuple[TensorSnapshot, float], ...]
    biases: tuple[TensorSnapshot, ...]

    @property
    def rank(self) -> int:
        """The sum of the ranks."""
        return sum(held.value.shape[1] for held in self.downs)

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for two that hold the same tensors."""
        held = [*self.downs, *(up for up, _ in self.ups), *self.biases]
        return (*(id(one.value) for one in held), *(scale for _, scale in self.ups))

    def down(self, ones: bool, dtype: torch.dtype) -> torch.Tensor:
        """(in, rank), and with ``ones`` a column of zeros more."""
        columns = [held.read().to(dtype) for held in self.downs]
        return torch.cat([*columns, columns[0].new_zeros(len(columns[0]), int(ones))], dim=1)

    def up(self, ones: bool, dtype: torch.dtype) -> torch.Tensor:
        """(rank, out), and with ``ones`` the bias as one row more."""
        rows = [(_wide(up) * scale).to(dtype) for up, scale in self.ups]
        return torch.cat([*rows, *([self.bias(dtype)[None]] if ones else [])])

    def bias(self, dtype: torch.dtype) -> torch.Tensor:
        """(out,), the sum of all."""
        total = sum(map(_wide, self.biases[1:]), _wide(self.biases[0]))
        return total.to(dtype)

    @property
    def is_trained(self) -> bool:
        """Whether a factor takes gradients; the layer's own weight may."""
        held = [*self.downs, *(up for up, _ in self.ups)]
        return any(one.is_trained for one in held)

    def promise(
        self, shape: tuple[int, ...], dtype: torch.dtype, make: Make, key: object
    ) -> LazyTensor:
        """A constant made of these tensors; computed at once if a factor is being trained."""
        value = LazyTensor(shape, dtype, lambda: make().contiguous(), (key, self.key))
        if self.is_trained:
            value.materialize()
        return value


def _wide(held: TensorSnapshot) -> torch.Tensor:
    """The tensor in float32 or wider."""
    value = held.read()
    return value.to(torch.promote_types(value.dtype, torch.float32))
