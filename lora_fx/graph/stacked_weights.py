"""Constants that a form of a branch reads: weights put beside each other, computed when read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from lora_fx.errors import PassError
from lora_fx.graph.constants import version
from lora_fx.graph.lazy_tensor import LazyTensor, get_unevaluated

Make = Callable[[], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor of a graph as it is now, to be read later.

    Attributes:
        name: in the graph.
        value: the tensor, or what computes it.
        count: how often it had been written to.
    """

    name: str
    value: torch.Tensor | LazyTensor
    count: int

    @classmethod
    def of(cls, gm: fx.GraphModule, node: fx.Node) -> Held:
        """What a ``get_attr`` node fetches."""
        value = get_unevaluated(gm, str(node.target))
        return cls(str(node.target), value, version(value))

    def read(self) -> torch.Tensor:
        """The tensor.

        Raises:
            PassError: it was written to in the meantime.
        """
        if isinstance(self.value, LazyTensor):
            return self.value.evaluate().detach()
        if version(self.value) != self.count:
            raise PassError(
                f"{self.name} was changed in place after a form was chosen and before its "
                "weights were read: choose again"
            )
        return self.value.detach()

    def wide(self, scale: float = 1.0) -> torch.Tensor:
        """The tensor times a number, in float32 or wider."""
        value = self.read()
        return value.to(torch.promote_types(value.dtype, torch.float32)) * scale


@dataclass(frozen=True)
class Factors:
    """What one layer's branches add: ``(x A) B + bias``, the sum of all of them.

    Attributes:
        downs: each (in, r).
        ups: each (r, out), with its scale.
        biases: each (out,): the layer's own and the branches'.
    """

    downs: tuple[Held, ...]
    ups: tuple[tuple[Held, float], ...]
    biases: tuple[Held, ...]

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
        rows = [up.wide(scale).to(dtype) for up, scale in self.ups]
        return torch.cat([*rows, *([self.bias(dtype)[None]] if ones else [])])

    def bias(self, dtype: torch.dtype) -> torch.Tensor:
        """(out,), the sum of all."""
        total = sum((held.wide() for held in self.biases[1:]), self.biases[0].wide())
        return total.to(dtype)

    @property
    def is_trained(self) -> bool:
        """Whether a factor takes gradients; the layer's own weight may."""
        held = [*self.downs, *(up for up, _ in self.ups)]
        return any(getattr(one.value, "requires_grad", False) for one in held)

    def promise(
        self, shape: tuple[int, ...], dtype: torch.dtype, make: Make, key: object
    ) -> LazyTensor:
        """A constant made of these tensors; computed at once if a factor is being trained."""
        value = LazyTensor(shape, dtype, lambda: make().contiguous(), (key, self.key))
        if self.is_trained:
            value.materialize()
        return value
