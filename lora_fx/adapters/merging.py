"""Weighted sums of adapters that are adapters again."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.scaling import checked_rank
from lora_fx.adapters.weighted import WAYS, Term, summed, term_of
from lora_fx.errors import AdapterError, within


def combine(
    adapters: Sequence[tuple[Adapter, float]],
    how: str = "cat",
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
            if name in found and not _are_equal(found[name], tensor):
                raise AdapterError(
                    f"{name}: adapters {owners[name]} and {adapter.name} each replace it, with "
                    "different tensors, which have no weighted sum; drop one of the two"
                )
            found.setdefault(name, tensor)
            owners.setdefault(name, adapter.name)
    return found


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    wide = torch.promote_types(one.dtype, other.dtype)
    return one.shape == other.shape and torch.equal(one.to(wide), other.to(wide))
