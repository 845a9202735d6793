"""LoHa and LoKr as PEFT stores them, and LoKr of another program in PEFT's words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.adapters.scaling import alpha_for, checked_alpha
from lora_fx.formats.peft.config import Numbers, Patterned, Tensors, settings_of, stored_tensors
from lora_fx.formats.peft.fields import Fields, checked, words
from lora_fx.formats.peft.wrappers import Home

Pair = tuple[int, int]
_NEUTRAL = words("rank_dropout module_dropout init_weights")


@dataclass(frozen=True, kw_only=True)
class LohaConfig(Patterned):
    """LoHa; LyCORIS' kinds have no biases, and no trained tokens beside them."""

    peft_type = "LOHA"
    kinds = ("loha",)
    leaves: ClassVar[tuple[str, ...]] = (
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    )  # fmt: skip
    ranked = ("hada_w1_b", "hada_w2_b")
    options: ClassVar[tuple[str, ...]] = ("use_effective_conv2d",)
    lacks = words("bias trainable_token_indices ensure_weight_tying")
    neutral = _NEUTRAL

    alpha: float = checked(checked_alpha, needed=True)
    use_effective_conv2d: bool = False

    def settings(self, path: str, tensors: Tensors) -> Fields:
        """The scale is alpha / r, after both patterns."""
        rank, scale = self.rank_and_scale(path)
        own = {"r": rank, "alpha": self.alpha_of(path), "scale": scale, "writer": "peft"}
        return super().settings(path, tensors) | own

    @classmethod
    def described(cls, layers: Mapping[str, AnyUpdate], homes: Mapping[str, Home]) -> Fields:
        """Ranks and alphas, and what all layers agree on."""
        fields = super().described(layers, homes)
        if any("hada_t1" in stored_tensors(update) for update in layers.values()):
            fields["use_effective_conv2d"] = True
        return fields

    @classmethod
    def numbers(cls, layers: Mapping[str, AnyUpdate]) -> tuple[Numbers, Numbers]:
        """Rank and alpha of each layer; the alpha that its file had, where that gives its scale."""
        ranks: dict[str, float] = {}
        alphas: dict[str, float] = {}
        for path, update in layers.items():
            settings, tensors = settings_of(update), stored_tensors(update)
            found = [len(tensors[leaf]) for leaf in cls.ranked if leaf in tensors]
            rank, scale = int(settings.get("r") or found[0]), float(settings["scale"])
            said: Any = settings.get("alpha")
            is_exact = said is not None and said / rank == scale
            ranks[path], alphas[path] = rank, said if is_exact else alpha_for(scale, rank)
        return ranks, alphas

    @classmethod
    def tensors_of(cls, layers: Mapping[str, AnyUpdate]) -> dict[str, dict[str, torch.Tensor]]:
        """The stored tensors; PEFT's cores have two axes for the kernel, LyCORIS' may have one."""
        return {
            path: {
                leaf: t[..., None] if leaf in ("hada_t1", "hada_t2") and t.ndim == 3 else t
                for leaf, t in own.items()
            }
            for path, own in super().tensors_of(layers).items()
        }


@dataclass(frozen=True, kw_only=True)
class LokrConfig(LohaConfig):
    """LoKr."""

    peft_type = "LOKR"
    kinds = ("lokr",)
    leaves = (
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    )  # fmt: skip
    ranked = ("lokr_w1_b", "lokr_w2_b")
    options = (
        "use_effective_conv2d", "decompose_both", "decompose_factor",
    )  # fmt: skip
    neutral = _NEUTRAL | {"rank_dropout_scale"}

    decompose_both: bool = False
    decompose_factor: int = -1

    @classmethod
    def adopted(cls, layers: Mapping[str, AnyUpdate]) -> Mapping[str, AnyUpdate] | None:
        """The updates with the fields that make PEFT cut their layers as they are cut."""
        found = super().adopted(layers)
        return None if found is None else with_fields(found)


@dataclass(frozen=True)
class Cut:
    """How one layer (a c, b d, *kernel) is cut.

    Attributes:
        outer: (a, b), of w1.
        inner: (c, d), of w2.
        is_low: whether w1 and w2 are of low rank.
        rank: of what is, or None.
        has_core: whether w2 has a core.
    """

    outer: Pair
    inner: Pair
    is_low: tuple[bool, bool]
    rank: int | None
    has_core: bool


def with_fields(layers: Mapping[str, AnyUpdate]) -> dict[str, AnyUpdate] | None:
    """The updates with the fields that PEFT needs on their ``stored``, or None if there are none.

    PEFT cuts a layer by ``decompose_factor``, and takes low rank where r is below half of what is
    cut. Updates that were read from PEFT have the fields already.
    """
    if all(u.stored and "decompose_factor" in u.stored.settings for u in layers.values()):
        return dict(layers)
    cuts = {path: _cut(update) for path, update in layers.items()}
    known = {path: cut for path, cut in cuts.items() if cut is not None}
    factor = _factor(known) if len(known) == len(cuts) else None
    if factor is None:
        return None
    both = any(cut.is_low[0] for cut in known.values())
    cores = any(cut.has_core for cut in known.values())
    found: dict[str, AnyUpdate] = {}
    for path, cut in known.items():
        # Without a rank of its own it may be any that is too high to be low.
        rank = cut.rank or max(*cut.outer, *cut.inner)
        halves = rank < max(cut.outer) / 2, rank < max(cut.inner) / 2
        if cut.is_low != (both and halves[0], halves[1]):
            return None
        fields = {"r": rank, "decompose_both": both, "decompose_factor": factor}
        fields |= {"use_effective_conv2d": cores}
        found[path] = _with_settings(layers[path], fields)
    return found


def split(size: int, factor: int) -> Pair:
    """The two factors of a size: ``factorization`` of PEFT 0.21.

    Args:
        size: of a side of a layer.
        factor: the first of the two if it divides the size (LyCORIS puts the smaller first even
            then), else a bound of the first, which is the smaller; -1 is none.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    bound = min(math.isqrt(size), factor if factor > 0 else size)
    smaller = max(n for n in range(1, bound + 1) if size % n == 0)
    return smaller, size // smaller


def _factor(cuts: Mapping[str, Cut]) -> int | None:
    """The decompose_factor that cuts every layer as it is."""
    sizes = {size for cut in cuts.values() for size in cut.outer}
    for factor in (-1, *sorted(sizes)):
        if all(_cuts_as(cut, factor) for cut in cuts.values()):
            return factor
    return None


def _cuts_as(cut: Cut, factor: int) -> bool:
    return all(split(m * n, factor) == (m, n) for m, n in zip(cut.outer, cut.inner, strict=True))


def _cut(update: AnyUpdate) -> Cut | None:
    """How an update is cut; None for what PEFT has no tensors for, or others of another meaning."""
    if not update.makes_anew or update.stored is None or len(update.shape) == 3:
        return None
    tensors = update.stored.tensors
    core, low = "lokr_t2" in tensors, ("lokr_w1_a" in tensors, "lokr_w2_a" in tensors)
    outer = _sides(tensors, "lokr_w1", False)
    inner = _sides(tensors, "lokr_w2", core)
    ranks = {len(tensors[leaf]) for leaf in ("lokr_w1_b", "lokr_w2_b") if leaf in tensors}
    if len(ranks) > 1 or {"dora_scale"} & tensors.keys():
        return None
    columns = update.shape[1]
    if not core and "lokr_w2_b" in tensors and columns is not None and outer[1]:
        inner = inner[0], columns // outer[1]  # the file has its kernel flat
    return Cut(outer, inner, low, next(iter(ranks), None), core)


def _sides(tensors: Mapping[str, torch.Tensor], name: str, has_core: bool) -> Pair:
    if name in tensors:
        return tensors[name].shape[0], tensors[name].shape[1]
    left, right = tensors[f"{name}_a"], tensors[f"{name}_b"]
    return left.shape[1 if has_core else 0], right.shape[1]


def _with_settings(update: AnyUpdate, fields: Mapping[str, object]) -> AnyUpdate:
    assert update.stored is not None
    settings = {**update.stored.settings, **fields}
    return replace(update, stored=replace(update.stored, settings=settings))
