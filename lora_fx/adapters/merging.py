"""Merges adapters: weighted sums that are adapters again."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.other_updates import AnyUpdate, low_rank
from lora_fx.adapters.parameter_updates import for_parameter, name_of
from lora_fx.adapters.scaling import checked_rank
from lora_fx.adapters.source_record import EMBEDDING, is_embedding, kept
from lora_fx.adapters.updates import Update
from lora_fx.choices import Combination, takes
from lora_fx.errors import AdapterError, within
from lora_fx.numerics import equal_numbers


@takes(AdapterError)
def combine(
    adapters: Sequence[tuple[Adapter, float]],
    how: Combination = "cat",
    rank: int | None = None,
    name: str | None = None,
) -> Adapter:
    """Blends adapters: layer by layer the sum of ``weight * scale * up @ down``.

    Every update counts with the scale it has by itself, so kinds, ranks and scales may differ, as
    long as each is a product of two factors: LoRA, rsLoRA, AdaLoRA, VeRA, LoHa, of linear,
    embedding and ungrouped convolution layers. The result is plain LoRA.
    Biases of updates are summed with the same weights. A layer that only some adapters have gets
    the sum of those. Weights do not act on replacements, which are whole tensors: they are taken
    as they are, and those that several adapters hold must be equal.

    The new factors are computed and kept in float32 or wider, with scale 1: no value is rounded
    to half precision before the layer that it meets asks for it.

    Args:
        adapters: pairs of an adapter and its weight; weights may be negative.
        how: ``"cat"``, the exact sum, of the sum of the ranks; ``"svd"``, the nearest update of
            ``rank`` to that sum; ``"linear"``, the factors themselves blended with the roots of
            the factors, as PEFT's ``add_weighted_adapter`` does: small, and rough, for it holds
            the products of one adapter's up with another's down as well; ranks must be equal.
        rank: for ``"svd"``; by default the highest of the layer's ranks. What it cuts off is told
            by ``combine(adapters).to_rank(rank)``.
        name: of the result; the adapters' names joined by default.

    Raises:
        AdapterError: no adapters, a weight that is no finite number, an unknown ``how``, an
            update that is no such product (DoRA, (IA)3, LoKr, ...), layers or replacements that
            differ, or a result that is not finite.
    """
    _check_arguments(adapters, how, rank)
    terms = _terms(adapters)
    updates = {}
    for path, found in terms.items():
        with within(path):
            updates[path] = summed(found, how, rank)
    rules = [adapter.expects for adapter, _ in adapters]
    return Adapter(
        name or "_".join(dict.fromkeys(adapter.name for adapter, _ in adapters)),
        updates,
        _replacements([adapter for adapter, _ in adapters]),
        expects=rules[0] if all(rule == rules[0] for rule in rules) else None,
    )


def _check_arguments(adapters: Sequence[tuple[Adapter, float]], how: str, rank: int | None) -> None:
    if how not in WAYS:
        raise AdapterError(f"how is {how!r:.80}, expected one of {', '.join(WAYS)}")
    if rank is not None and how != "svd":
        raise AdapterError(f"rank={rank!r:.80} is for how='svd', not for how={how!r}")
    if rank is not None:
        checked_rank("rank", rank)
    if not isinstance(adapters, (list, tuple)) or not adapters:
        raise AdapterError("there is nothing to combine: give pairs [(adapter, 0.7), ...]")
    for pair in adapters:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not _is_weighted(*pair):
            raise AdapterError(f"found {pair!r:.200}, expected an Adapter and a finite weight")


def _is_weighted(adapter: object, weight: object) -> bool:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        return False
    # False for NaN and infinity, and for integers that no float holds.
    return isinstance(adapter, Adapter) and abs(weight) <= sys.float_info.max


def _terms(adapters: Sequence[tuple[Adapter, float]]) -> dict[str, list[Term]]:
    """What there is to add, by module path."""
    terms: dict[str, list[Term]] = {}
    for adapter, weight in adapters:
        for path, update in adapter.updates.items():
            terms.setdefault(path, []).append(term_of(adapter.name, path, update, weight))
    return terms


def _replacements(adapters: list[Adapter]) -> dict[str, torch.Tensor]:
    """Every adapter's replacements; two of one name must be one tensor."""
    found: dict[str, torch.Tensor] = {}
    owners: dict[str, str] = {}
    for adapter in adapters:
        for name, tensor in adapter.replacements.items():
            if name in found and not equal_numbers(found[name], tensor):
                raise AdapterError(
                    f"{name}: adapters {owners[name]} and {adapter.name} each replace it, with "
                    "different tensors, which have no weighted sum; drop one of the two"
                )
            found.setdefault(name, tensor)
            owners.setdefault(name, adapter.name)
    return found


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
