"""Reads of ``tensor.data``, said so that a tracer sees them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

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
