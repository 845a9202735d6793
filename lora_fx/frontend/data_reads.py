"""Reads of ``tensor.data`` and of ``len(tensor)``, said so that a tracer sees them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_DATA: Any = torch._C.TensorBase.data


@contextmanager
def data_detached() -> Iterator[None]:
    """Lets ``tensor.data`` be ``tensor.detach()``: the same memory, by a call that is recorded.

    A tensor that ``.data`` gives is of no graph: torch.export takes it for a constant that it has
    never seen. What is set by ``tensor.data = value`` is set as ever.
    """
    torch.Tensor.data = property(  # type: ignore[assignment]
        lambda tensor: tensor.detach(), lambda tensor, value: _DATA.__set__(tensor, value)
    )
    try:
        yield
    finally:
        del torch.Tensor.data


@contextmanager
def lengths_free(model: nn.Module) -> Iterator[None]:
    """Lets ``len(tensor)`` be ``tensor.shape[0]`` in the files that hold the code of a model.

    Python makes an int of what ``len`` gives, and torch.export takes a free size for a constant.
    """
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    files = {kind.__module__ for kind in kinds if kind.__module__.partition(".")[0] != "torch"}
    spaces = [vars(sys.modules[file]) for file in files if file in sys.modules]
    spaces = [space for space in spaces if "len" not in space]
    for space in spaces:
        space["len"] = _length
    try:
        yield
    finally:
        for space in spaces:
            del space["len"]


def _length(value: Any) -> Any:
    return value.shape[0] if isinstance(value, torch.Tensor) and value.ndim else len(value)
