"""Sparse matrices, said densely while a layer is traced: torch.export has no sparse tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def sparse_said_densely() -> Iterator[None]:
    """Lets ``torch.sparse_coo_tensor`` and what is done with its result be calls on dense ones.

    A difference that is sparse (SHiRA), or a factor (FRoD), is then a constant like any other. It
    has values wherever it is asked for their number, as the graph must hold for all values.
    """
    own = torch.sparse_coo_tensor, torch.sparse.mm, torch.Tensor.coalesce, torch.Tensor._nnz
    names: Any = torch, torch.sparse, torch.Tensor, torch.Tensor
    said: Any = _dense, torch.mm, _if_strided(own[2], _same), _if_strided(own[3], torch.numel)
    functions = ("sparse_coo_tensor", "mm", "coalesce", "_nnz")
    try:
        for holder, function, value in zip(names, functions, said, strict=True):
            setattr(holder, function, value)
        yield
    finally:
        for holder, function, value in zip(names, functions, own, strict=True):
            setattr(holder, function, value)


def _dense(indices: torch.Tensor, values: torch.Tensor, size: Any, **options: Any) -> torch.Tensor:
    zeros = torch.zeros(tuple(size), dtype=values.dtype)
    return zeros.index_put(tuple(indices.long().unbind()), values, accumulate=True)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _if_strided(sparse: Any, strided: Any) -> Any:
    return lambda tensor: (strided if tensor.layout is torch.strided else sparse)(tensor)
