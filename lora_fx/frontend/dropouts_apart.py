"""Dropout that does nothing returns an alias while tracing, so that it and its input are two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch._C import DispatchKey

from lora_fx.graph.ops import aten

_NAMES = ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout")
_KEY = DispatchKey.CompositeImplicitAutograd

Kernel = Callable[..., torch.Tensor]


@contextmanager
def dropouts_apart() -> Iterator[None]:
    """Lets dropout in eval mode return another name of its input: the same memory.

    It returns the very tensor it was given, and torch.export takes everyone who reads that tensor
    afterwards for a reader of dropout, which matters in training.
    """
    operators = [getattr(aten, name).default for name in _NAMES]
    before: list[Kernel | None] = [operator.py_kernels.get(_KEY) for operator in operators]
    for operator, kernel in zip(operators, before, strict=True):
        _use(operator, partial(_called, kernel or partial(operator._op_dk, _KEY)))
    try:
        yield
    finally:
        for operator, kernel in zip(operators, before, strict=True):
            _use(operator, kernel)


def _called(own: Kernel, input: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    if train and p:
        return own(input, p, train)
    alias: torch.Tensor = aten.alias.default(input)
    return alias


def _use(operator: Any, kernel: Kernel | None) -> None:
    """Sets what Python has of an operator, or takes it away."""
    operator.py_kernels.pop(_KEY, None)
    if kernel is not None:
        operator.py_kernels[_KEY] = kernel
    operator._dispatch_cache.clear()
