"""Tensors that are computed when somebody reads them.

A module keeps its parameters in a dictionary. `Parameters` is one that may hold a `LazyTensor` in
place of a tensor: whoever reads it gets the tensor, `get_unevaluated` what will compute it. So a
folded graph holds one weight at a time until it is run.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, ItemsView, Iterable, Iterator, ValuesView
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_fx.errors import PassError


class LazyTensor:
    """A tensor to be.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
        make: computes it; what it is made of is read by `TensorSnapshot.read`.
        key: two of one key are equal.
        cache: whether it is computed once for all readers, or anew for each and never kept.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        make: Callable[[], torch.Tensor],
        key: Hashable,
        cache: bool = True,
    ) -> None:
        self.shape, self.dtype, self.key, self.cache = shape, dtype, key, cache
        self._make: Callable[[], torch.Tensor] | None = make
        self._cached: nn.Parameter | None = None
        self._version = 0

    @property
    def version(self) -> int:
        """How often the tensor was written to since it was computed."""
        return 0 if self._cached is None else version(self._cached) - self._version

    def equals(self, other: object) -> bool:
        """Whether another is computed alike from the same tensors."""
        return isinstance(other, LazyTensor) and self.key == other.key

    def evaluate(self) -> torch.Tensor:
        """The tensor, which is not kept: for those who write it somewhere and go on.

        Raises:
            PassError: a tensor that it is made of was written to in the meantime.
        """
        if self._cached is not None:
            return self._cached
        assert self._make is not None
        return self._make()

    def materialize(self) -> nn.Parameter:
        """The tensor, computed once for all who read it; what it is made of is let go."""
        if self._cached is not None:
            return self._cached
        value = nn.Parameter(self.evaluate(), requires_grad=False)
        if self.cache:
            self._cached, self._version = value, version(value)
            self._make = None
        return value

    def uncached(self) -> LazyTensor:
        """The same, computed anew for whoever reads it, and never kept."""
        return LazyTensor(self.shape, self.dtype, self.evaluate, self.key, cache=False)


@dataclass(frozen=True, eq=False)
class TensorSnapshot:
    """A tensor of a graph, and how often it had been written to.

    Attributes:
        name: in the graph.
        value: the tensor, or what computes it.
        version: when it was taken.
    """

    name: str
    value: torch.Tensor | LazyTensor
    version: int

    @classmethod
    def of(cls, root: nn.Module, name: str) -> TensorSnapshot:
        """What a module holds under a dotted name; it is not computed."""
        value = get_unevaluated(root, name)
        return cls(name, value, version(value))

    @property
    def is_trained(self) -> bool:
        """Whether it takes gradients."""
        return getattr(self.value, "requires_grad", False)

    def read(self) -> torch.Tensor:
        """The tensor; one that is still to be computed is not kept.

        Raises:
            PassError: it was written to in the meantime.
        """
        if version(self.value) != self.version:
            raise PassError(
                f"{self.name} was changed in place after a weight was made of it and before that "
                "was read: fold again, or choose a form again"
            )
        return evaluate(self.value)


def evaluate(value: torch.Tensor | LazyTensor) -> torch.Tensor:
    """A tensor, without its gradients; one that is still to be computed is not kept."""
    return (value.evaluate() if isinstance(value, LazyTensor) else value).detach()


def version(value: Any) -> int:
    """How often a tensor was written to, where torch counts that."""
    if isinstance(value, LazyTensor):
        return value.version
    counted = isinstance(value, torch.Tensor) and not value.is_inference()
    return value._version if counted else 0


class Parameters(dict[str, Any]):
    """The parameters of one module, some of which are still to be computed."""

    def __getitem__(self, name: str) -> Any:
        """Computes what is read."""
        value = super().__getitem__(name)
        return value.materialize() if isinstance(value, LazyTensor) else value

    def __iter__(self) -> Iterator[str]:
        """Keeps ``dict(self)`` from copying what is lazy unread."""
        return super().__iter__()

    def values(self) -> ValuesView[Any]:  # type: ignore[override]  # not dict's own class
        """Computes everything, one after the other."""
        return ValuesView(self)

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]  # not dict's own class
        """Computes everything, one after the other."""
        return ItemsView(self)

    def get(self, name: str, default: Any = None) -> Any:
        """Computes what is read."""
        if name not in self:
            return default
        return self[name]

    def copy(self) -> Parameters:
        """A copy that is as lazy."""
        return Parameters({name: self.unevaluated(name) for name in self})

    def unevaluated(self, name: str) -> Any:
        """The tensor, or what will compute it."""
        return super().__getitem__(name)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are of tensors."""
        return dict, (list(self.items()),)


def get_unevaluated(root: nn.Module, target: str) -> Any:
    """Looks up a dotted name; a lazy parameter is not computed."""
    *path, name = target.split(".")
    holder: Any = root
    for step in path:
        holder = getattr(holder, step)
    store = holder.__dict__.get("_parameters") if isinstance(holder, nn.Module) else None
    if isinstance(store, Parameters) and name in store:
        return store.unevaluated(name)
    return getattr(holder, name)


def get_all_unevaluated(root: nn.Module, targets: Iterable[str]) -> dict[str, Any]:
    """Looks up dotted names: each -> its value; no lazy parameter is computed."""
    return {target: get_unevaluated(root, target) for target in targets}


def find_tensor(root: nn.Module, target: str) -> torch.Tensor | None:
    """A tensor by its dotted name; None if there is none, or a lazy one."""
    try:
        value = get_unevaluated(root, target)
    except AttributeError:
        return None
    return value if isinstance(value, torch.Tensor) else None


def set_lazy(holder: nn.Module, name: str, value: LazyTensor) -> None:
    """Gives a module a parameter that is computed when read."""
    if not isinstance(holder._parameters, Parameters):
        holder.__dict__["_parameters"] = Parameters(holder._parameters)
    holder._parameters[name] = value  # type: ignore[assignment]  # a parameter when read
