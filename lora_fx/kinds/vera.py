"""VeRA: two projections that all layers share, and two vectors of each layer between them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from lora_fx.adapters.source_record import SourceRecord
from lora_fx.adapters.updates import AnyUpdate, Update
from lora_fx.errors import AdapterError
from lora_fx.kinds.validation import layer_shape, measure
from lora_fx.numerics import widened

_SHAPES = {
    "vera_lambda_b": ("out",),
    "vera_lambda_d": ("r",),
    "vera_A": ("r", "widest in"),
    "vera_B": ("widest out", "r"),
}
LEAVES = frozenset(_SHAPES)


def read(tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> AnyUpdate:
    """Reads ``diag(lambda_b) B[:out] diag(lambda_d) A[:, :in]`` as ``up @ down``.

    Source: Kopiczko et al., VeRA, arXiv:2310.11454; ``vera`` of PEFT 0.21.

    Args:
        tensors: vera_lambda_b (out,) and vera_lambda_d (r,) of the layer; vera_A (r, widest in)
            and vera_B (widest out, r), which all layers of the file share.
        settings: ``shape`` of the layer, whose ``in`` no tensor tells; without it that of vera_A.

    Returns:
        An update of kind ``"vera"`` and of scale 1.

    Raises:
        AdapterError: a tensor is missing, not used or of another shape; a setting is wrong.
    """
    shared = sorted({"vera_A", "vera_B"} - tensors.keys())
    if shared:
        raise AdapterError(
            f"{shared[0]} is missing: the file holds a seed in its place, from which only "
            "the program that made it draws the same numbers; save it with save_projection=True"
        )
    sizes, layer = measure(tensors, _SHAPES), layer_shape(settings)
    out, into = sizes["out"], sizes["widest in"]
    if layer is not None and (len(layer) > 2 or layer[0] != out or layer[1] > into):
        raise AdapterError(f"a VeRA of out {out} and in up to {into}, the layer is {layer}")
    if sizes["widest out"] < out:
        found = tuple(tensors["vera_B"].shape)
        raise AdapterError(f"vera_B is {found}, expected at least {out} rows")
    columns = into if layer is None else layer[1]
    down = widened(tensors["vera_lambda_d"])[:, None] * widened(tensors["vera_A"][:, :columns])
    up = widened(tensors["vera_lambda_b"])[:, None] * widened(tensors["vera_B"][:out])
    return Update(down, up, 1.0, kind="vera", stored=SourceRecord(tensors, settings))


def drawn(rank: int, into: int, out: int, seed: int) -> dict[str, torch.Tensor]:
    """Both projections as PEFT draws them: Kaiming-uniform, by its own order of rounding."""
    generator = torch.Generator().manual_seed(seed)

    def values(rows: int, columns: int) -> torch.Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    return {"vera_A": values(rank, into), "vera_B": values(out, rank)}
