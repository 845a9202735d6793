"""Trained rows of an embedding table, which take the place of the table's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lora_fx.adapters.other_updates import WeightUpdate
from lora_fx.adapters.source_record import SourceRecord
from lora_fx.adapters.updates import AnyUpdate
from lora_fx.algebra.index_expr import listed
from lora_fx.algebra.matrix_expr import Matrix, Replaced, constant, transposed
from lora_fx.errors import AdapterError
from lora_fx.kinds.validation import flag, layer_shape, measure

LEAVES = frozenset({"trainable_tokens_delta"})


def read(tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> AnyUpdate:
    """Reads ``W`` with some tokens replaced; in spite of the name nothing is added.

    Source: ``trainable_tokens`` of PEFT 0.21.

    Args:
        tensors: trainable_tokens_delta (n, dim).
        settings: ``indices``: the n tokens, as the config has them; ``head``: true where the layer
            is linear and has a token a row, as a head tied to the table does; ``shape`` of the
            layer, if known.

    Returns:
        An update of kind ``"tokens"`` of a table (dim, num), canonically; of a head (num, dim).

    Raises:
        AdapterError: the tensor is missing or of another shape; a setting is wrong.
    """
    sizes = measure(tensors, {"trainable_tokens_delta": ("n", "dim")})
    axis = 0 if flag(settings, "head", False) else 1
    layer = layer_shape(settings)
    num = None if layer is None else layer[axis]
    if layer is not None and layer[1 - axis] != sizes["dim"]:
        found = f"trainable_tokens_delta has dim {sizes['dim']}"
        raise AdapterError(f"{found}, the layer is {layer} with tokens along axis {axis}")
    indices = _indices(settings, sizes["n"], num)
    rows = tensors["trainable_tokens_delta"]
    shape = (sizes["dim"], num) if axis else (num, sizes["dim"])

    index = listed(torch.tensor(indices))
    assert index is not None  # none is there twice

    def replaced(weight: Matrix) -> Matrix:
        by_token = transposed(weight) if axis else weight
        made = Replaced(by_token, index, constant(rows))
        return transposed(made) if axis else made

    return WeightUpdate("tokens", replaced, shape, SourceRecord(tensors, settings))


def _indices(settings: Mapping[str, Any], count: int, num: int | None) -> list[int]:
    """The tokens, each of them once and inside the table."""
    given = settings.get("indices")
    if not isinstance(given, tuple | list) or any(type(token) is not int for token in given):
        raise AdapterError(f"setting indices is {given!r:.80}, expected a list of integers")
    if len(given) != count or len(set(given)) != count:
        found = f"{len(given)} indices, {len(set(given))} of them different"
        raise AdapterError(f"{found}, and {count} rows of trainable_tokens_delta")
    outside = [token for token in given if token < 0 or (num is not None and token >= num)]
    if outside:
        limit = "" if num is None else f" and below {num}"
        raise AdapterError(f"token {outside[0]} of indices, expected at least 0{limit}")
    return list(given)
