"""Sizes that come out of a file: bounded before memory is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_AT_LEAST = 1 << 26
_TIMES = 64  # what a type of PEFT makes of one layer: stages of permutations, bases, spectra


class Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses to make a tensor that is far larger than any of the base's.

    A rank of a billion in a config is a number of the file's like any other, and PEFT would fill
    as much memory with what it starts from.

    Args:
        tensors: of the base.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = max([_AT_LEAST, *(_TIMES * tensor.numel() for tensor in tensors)])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs an operator, unless it makes too much of nothing but sizes."""
        sizes = args[0] if args else None
        is_size = isinstance(sizes, list | tuple) and all(type(size) is int for size in sizes)
        count = prod(sizes) if is_size and sizes else 0
        if count > self.most:
            raise MemoryError(f"{count} numbers at once, {self.most} are allowed")
        return func(*args, **(kwargs or {}))
