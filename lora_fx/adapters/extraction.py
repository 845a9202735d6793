"""The low-rank difference of two models, as an adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from lora_fx.adapters.adapter import Adapter, Update, check_name
from lora_fx.adapters.model_diff import Pair, matched, shared
from lora_fx.adapters.scaling import check_cut
from lora_fx.adapters.source_record import EMBEDDING
from lora_fx.algebra.truncation import cut, of_tensor, rank_of
from lora_fx.choices import takes
from lora_fx.errors import AdapterError
from lora_fx.layers.layer_types import TYPES
from lora_fx.numerics import equal_numbers


class Extracted(NamedTuple):
    """What `extract` found.

    Attributes:
        adapter: an update for each linear, embedding or convolution layer that differs, a
            replacement for each other floating-point tensor that does.
        errors: module path -> Frobenius norm of what the update leaves of the layer's difference,
            over that of the difference.
        left_out: tensor -> why it differs and yet is not in the adapter.
    """

    adapter: Adapter
    errors: Mapping[str, float]
    left_out: Mapping[str, str]


@takes(AdapterError)
def extract(
    base: nn.Module,
    tuned: nn.Module,
    rank: int | None = None,
    energy: float | None = None,
    *,
    name: str = "extracted",
) -> Extracted:
    """Finds the adapter that turns one model into another of the same layers.

    The difference of each linear layer (``nn.Linear``, transformers' Conv1D), embedding and
    ungrouped convolution, or site of a graph, is cut off by singular value decomposition, a
    kernel's as (out, in * kernel). One difference is in memory at a time, in float32 or wider; so
    are the factors found. What a low-rank update cannot say (biases, norms, grouped convolutions,
    a weight that an embedding shares with a linear layer) becomes a replacement, the tuned
    model's own values. Equal tensors are left out, and shared ones are compared once.

    Args:
        base: a module, or a traced graph.
        tuned: another with the same layers; a graph if the base is one.
        rank: the highest rank of an update, or
        energy: the fraction of the squared Frobenius norm of each difference to keep, in (0, 1].
        name: of the adapter.

    Returns:
        The adapter, the relative residual of each layer, and what could not be expressed.

    Raises:
        AdapterError: the models' layers or shapes differ, a difference is not finite, calls of one
            layer differ otherwise, or not just one of rank and energy is given.
    """
    check_name(name)
    check_cut(rank, energy)
    updates: dict[str, Update] = {}
    replacements: dict[str, torch.Tensor] = {}
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    groups = shared(matched(base, tuned))
    places = Counter(place for pairs in groups for place in {one.place for one, _ in pairs})
    for pairs in groups:
        found = _change(pairs, rank, energy)
        if found is not None and (apart := [o.place for o, _ in pairs if places[o.place] > 1]):
            raise AdapterError(
                f"{apart[0]}: of its calls not all read the same tensor, as after a fold, and no "
                "one update says what becomes of each: extract between graphs that were not folded"
            )
        names = [one.name for one, _ in pairs]
        if isinstance(found, str):
            left_out |= dict.fromkeys(names, found)
        elif isinstance(found, torch.Tensor):
            replacements |= dict.fromkeys(names, found)
        elif found is not None:
            layers = [one.layer for one, _ in pairs if one.layer is not None]
            updates |= dict.fromkeys(layers, found[0])
            errors |= dict.fromkeys(layers, found[1])
    return Extracted(Adapter(name, updates, replacements), errors, left_out)


def _change(
    pairs: list[Pair], rank: int | None, energy: float | None
) -> tuple[Update, float] | torch.Tensor | str | None:
    """What became of one tensor: an update and its residual, a new value, or why neither.

    A function of its own, so that nothing of one tensor is in memory when the next is read.
    """
    (one, two), *_ = pairs
    before, after = one.read(), two.read()
    if equal_numbers(before, after):
        return None
    if not (before.is_floating_point() and after.is_floating_point()):
        return f"an adapter holds no tensor of {after.dtype}"
    if not _is_layer(pairs):
        return after.clone()
    update, error = _factored(_difference(one.name, before, after, one.kind), rank, energy)
    return _of_layer(update, one.kind, before.shape), error


def _is_layer(pairs: list[Pair]) -> bool:
    """Whether nothing but layers of one kind reads a tensor, as a weight."""
    return all(one.layer is not None for one, _ in pairs) and (
        len({one.kind for one, _ in pairs}) == 1
    )


def _of_layer(update: Update, kind: str, shape: torch.Size) -> Update:
    """An update of a matrix as one of a layer whose weight is stored in a shape."""
    layer = TYPES[kind]
    down = update.down.reshape(-1, *layer.canonical_shape(tuple(shape))[1:])
    return replace(update, down=down, stored=EMBEDDING if layer.reads_ids else update.stored)


def _difference(name: str, before: torch.Tensor, after: torch.Tensor, kind: str) -> torch.Tensor:
    """``after - before`` as (out, in * kernel), in memory of its own, in float32 or wider."""
    wide = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    gap = after.to(wide, copy=True).sub_(before.to(after.device))
    if not gap.isfinite().all():
        raise AdapterError(f"{name}: the difference holds NaN or infinity; is a model damaged?")
    return TYPES[kind].canonical("weight", gap).flatten(1)


def _factored(gap: torch.Tensor, rank: int | None, energy: float | None) -> tuple[Update, float]:
    """The nearest update to a difference, and its measured relative residual."""
    svd = of_tensor(gap, rank, energy)
    found = cut(svd, rank_of(svd, max(gap.shape), rank, energy), gap.dtype)
    return Update(found.down, found.up, scale=1.0), found.error
