"""Sums of the updates of one layer, each with a factor: exact, or blended."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch

from lora_fx.adapters.other_updates import AnyUpdate, low_rank
from lora_fx.adapters.source_record import EMBEDDING, is_embedding, kept
from lora_fx.adapters.updates import Update
from lora_fx.errors import AdapterError, within
from lora_fx.injection.parameter_updates import for_parameter, name_of


@dataclass(frozen=True, eq=False)
class Term:
    """What one adapter brings to one layer: ``factor * up @ down``, factor = weight * scale."""

    adapter: str
    update: Update
    factor: float


def term_of(adapter: str, path: str, update: AnyUpdate, weight: float) -> Term:
    """One term of a sum.

    Raises:
        AdapterError: the update is no product of two factors that can be added to another.
    """
    with within(f"adapter {adapter}, {path}"):
        plain = low_rank(update, "a weighted sum")
        if plain.groups > 1:
            raise AdapterError(
                "the update of a grouped convolution, whose factors cannot be joined to others; "
                "leave it out"
            )
    return Term(adapter, plain, weight * plain.scale)


def summed(terms: Sequence[Term], how: str, rank: int | None) -> Update:
    """The update of one layer; an embedding's stays one.

    Args:
        terms: what to add.
        how: one of `WAYS`.
        rank: for ``"svd"``; by default the highest of the terms'.

    Raises:
        AdapterError: the layers or, for ``"linear"``, the ranks differ, or the sum is not finite.
    """
    terms = _aligned(_of_one_kind(terms))
    _check_shapes(terms)
    update = WAYS[how](terms)
    if not update.is_finite():
        raise AdapterError(
            f"the sum is not finite in {update.up.dtype}: an adapter holds NaN or "
            "infinity, or a weight is too large"
        )
    if how == "svd":
        update = update.to_rank(rank or max(term.update.rank for term in terms))[0]
    if all(is_embedding(term.update.stored) for term in terms):
        return replace(update, stored=EMBEDDING)
    first = terms[0].update
    return update if name_of(first) is None else replace(update, stored=kept(first.stored))


def _of_one_kind(terms: Sequence[Term]) -> list[Term]:
    """The terms as updates of a parameter, if they are; of a layer, if none is of a parameter."""
    names = {name_of(term.update) for term in terms}
    if len(names) > 1:
        raise AdapterError(
            f"some adapters are of the parameter {', '.join(filter(None, names))} as it is "
            "stored, others of a layer; combine adapters of one kind"
        )
    return [replace(term, update=for_parameter(term.update)) for term in terms]


def _aligned(terms: Sequence[Term]) -> list[Term]:
    """The terms in the shape of the layer: some kinds store the kernel of a convolution flat."""
    shape = max((term.update.down.shape[1:] for term in terms), key=len)
    return [
        replace(term, update=replace(term.update, down=term.update.down.reshape(-1, *shape)))
        if term.update.down.shape[1:] == (shape.numel(),)
        else term
        for term in terms
    ]


def _check_shapes(terms: Sequence[Term]) -> None:
    first = terms[0]
    for term in terms:
        if term.update.shape != first.update.shape:
            raise AdapterError(
                f"adapter {first.adapter} is made for a layer {_sizes(first.update)}, "
                f"adapter {term.adapter} for one {_sizes(term.update)}; "
                "combine adapters of one base"
            )


def _sizes(update: Update) -> str:
    out, into, *kernel = update.shape
    return f"{into} -> {out}" + (f" kernel {tuple(kernel)}" if kernel else "")


def _concatenated(terms: Sequence[Term]) -> Update:
    """Rank on rank: ``[f1 up1, f2 up2] @ [down1; down2] = f1 up1 @ down1 + f2 up2 @ down2``."""
    wide = _wide(terms)
    down = torch.cat([term.update.down.to(wide) for term in terms])
    up = torch.cat([term.factor * term.update.up.to(wide) for term in terms], dim=1)
    return Update(down, up, 1.0, bias=_bias(terms, wide))


def _blended(terms: Sequence[Term]) -> Update:
    """``(sum of root up) @ (sum of root down)``; the sign goes to one side, or it would vanish."""
    ranks = [term.update.rank for term in terms]
    if len(set(ranks)) > 1:
        raise AdapterError(f"how='linear' needs equal ranks, found {ranks}; use 'svd'")
    wide = _wide(terms)
    roots = [math.sqrt(abs(term.factor)) for term in terms]
    signed = [math.copysign(root, t.factor) for root, t in zip(roots, terms, strict=True)]
    down = _sum([s * t.update.down.to(wide) for s, t in zip(signed, terms, strict=True)])
    up = _sum([root * t.update.up.to(wide) for root, t in zip(roots, terms, strict=True)])
    return Update(down, up, 1.0, bias=_bias(terms, wide))


def _bias(terms: Sequence[Term], wide: torch.dtype) -> torch.Tensor | None:
    """The sum of the biases, which is exact however the factors are combined."""
    biases = [t.factor * t.update.bias.to(wide) for t in terms if t.update.bias is not None]
    return _sum(biases) if biases else None


def _wide(terms: Sequence[Term]) -> torch.dtype:
    """float32, or the widest dtype of the factors."""
    tensors = [tensor for term in terms for tensor in (term.update.down, term.update.up)]
    return reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def _sum(tensors: list[torch.Tensor]) -> torch.Tensor:
    return reduce(torch.add, tensors)


# An svd starts from the exact sum.
WAYS: Mapping[str, Callable[[Sequence[Term]], Update]] = {
    "cat": _concatenated,
    "linear": _blended,
    "svd": _concatenated,
}
