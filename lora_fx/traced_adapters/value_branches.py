"""Branches of a layer on its own values: taken while it is traced as they are when it is run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lora_fx.errors import AdapterError

_READS: Any = (
    torch.Tensor.__bool__,
    torch.Tensor.__float__,
    torch.Tensor.__int__,
    torch.Tensor.item,
)


@contextmanager
def branches_taken(layer: nn.Module, x: torch.Tensor) -> Iterator[None]:
    """Lets what a layer asks of its own tensors be numbers, so that it can be traced.

    ``if norm(Q) > eps`` of a trained Q is the same branch at each call, which torch.export cannot
    know.

    Args:
        layer: it is run once.
        x: an input.

    Raises:
        AdapterError: it asks so of what its input has a part in.
    """
    answers, own = _asked(layer, x), layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Answering(answers):
            return own(*args, **kwargs)

    if answers:
        layer.forward = forward
    try:
        yield
    finally:
        layer.__dict__.pop("forward", None)


def _asked(layer: nn.Module, x: torch.Tensor) -> Sequence[Any]:
    asking = _Asking(x)
    try:
        with asking:
            layer(x)
    except AdapterError:
        raise
    except Exception:  # its own code may raise anything, and does so again where it is traced
        return ()
    return asking.answers


class _Asking(TorchFunctionMode):
    """Notes what is asked of tensors.

    Attributes:
        answers: in order.
    """

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.answers: list[Any] = []
        self._of_input = {id(x): x}  # held, so that no other tensor gets such an id

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        is_of_input = not self._of_input.keys().isdisjoint(_tensors((args, kwargs)))
        if func in _READS and is_of_input:
            raise AdapterError("its Python code branches on what its input is")
        result = func(*args, **(kwargs or {}))
        if func in _READS:
            self.answers.append(result)
        elif is_of_input:
            self._of_input |= _tensors(result)
        return result


def _tensors(values: Any) -> dict[int, torch.Tensor]:
    return {id(leaf): leaf for leaf in pytree.tree_leaves(values) if torch.is_tensor(leaf)}


class _Answering(TorchFunctionMode):
    """Answers so again, in the same order."""

    def __init__(self, answers: Sequence[Any]) -> None:
        super().__init__()
        self._answers = iter(answers)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return next(self._answers) if func in _READS else func(*args, **(kwargs or {}))
