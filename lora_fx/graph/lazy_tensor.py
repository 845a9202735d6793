"""Parameters that are computed when somebody reads them.

A module keeps its parameters in a dictionary. `Parameters` is one that may hold a `LazyTensor` in
place of a tensor: whoever reads it gets the tensor, `get_unevaluated` what will compute it. So a
folded graph holds one weight at a time until it is run.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, ItemsView, Iterator, ValuesView
from typing import Any

import torch
from torch import nn


class LazyTensor:
    """A tensor to be.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
        make: computes it.
        key: two of one key are equal.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        make: Callable[[], torch.Tensor],
        key: Hashable,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.key = key
        self._make: Callable[[], torch.Tensor] | None = make
        self._cached: nn.Parameter | None = None

    def equals(self, other: object) -> bool:
        """Whether another is computed alike from the same tensors."""
        return isinstance(other, LazyTensor) and self.key == other.key

    def evaluate(self) -> torch.Tensor:
        """The tensor, which is not kept: for those who write it somewhere and go on."""
        return self._make() if self._cached is None and self._make else self.materialize()

    def materialize(self) -> nn.Parameter:
        """The tensor, computed once for all who read it; what it is made of is let go."""
        if self._cached is None and self._make is not None:
            self._cached = nn.Parameter(self._make(), requires_grad=False)
            self._make = None
        assert self._cached is not None
        return self._cached


class Fleeting(LazyTensor):
    """A promise that is computed anew for whoever reads it, and never kept."""

    def __init__(self, promise: LazyTensor) -> None:
        super().__init__(promise.shape, promise.dtype, promise.evaluate, promise.key)

    def materialize(self) -> nn.Parameter:
        """The tensor, which goes when its reader is done with it."""
        return nn.Parameter(self.evaluate(), requires_grad=False)


class Parameters(dict[str, Any]):
    """The parameters of one module, some of which are still to be computed."""

    def __getitem__(self, name: str) -> Any:
        """Computes what is read."""
        value = super().__getitem__(name)
        return value.materialize() if isinstance(value, LazyTensor) else value

    def __iter__(self) -> Iterator[str]:
        """Keeps ``dict(self)`` from copying the promises unread."""
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
        """A copy that promises the same."""
        return Parameters({name: self.unevaluated(name) for name in self})

    def unevaluated(self, name: str) -> Any:
        """The tensor, or what will compute it."""
        return super().__getitem__(name)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are of tensors."""
        return dict, (list(self.items()),)


def get_unevaluated(root: nn.Module, target: str) -> Any:
    """Looks up a dotted name; a deferred parameter is not computed."""
    *path, name = target.split(".")
    holder: Any = root
    for step in path:
        holder = getattr(holder, step)
    store = holder.__dict__.get("_parameters") if isinstance(holder, nn.Module) else None
    if isinstance(store, Parameters) and name in store:
        return store.unevaluated(name)
    return getattr(holder, name)


def set_lazy(holder: nn.Module, name: str, value: LazyTensor) -> None:
    """Gives a module a parameter that is computed when read."""
    if not isinstance(holder._parameters, Parameters):
        holder.__dict__["_parameters"] = Parameters(holder._parameters)
    holder._parameters[name] = value  # type: ignore[assignment]  # a parameter when read
