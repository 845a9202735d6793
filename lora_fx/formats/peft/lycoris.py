"""LoHa and LoKr as PEFT stores them, and LoKr of another program in PEFT's words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.adapters.scaling import alpha_for, checked_alpha
from lora_fx.adapters.updates import with_settings
from lora_fx.formats.peft.config import Numbers, Patterned, Tensors
from lora_fx.formats.peft.fields import Fields, checked, words

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
    def described(cls, layers: Mapping[str, AnyUpdate]) -> Fields:
        """Ranks and alphas, and what all layers agree on."""
        fields = super().described(layers)
        if any("hada_t1" in update.stored_tensors for update in layers.values()):
            fields["use_effective_conv2d"] = True
        return fields

    @classmethod
    def numbers(cls, layers: Mapping[str, AnyUpdate]) -> Numbers:
        """Rank and alpha of each layer; the alpha that its file had, where that gives its scale."""
        numbers = {}
        for path, update in layers.items():
            settings, tensors = update.stored_settings, update.stored_tensors
            found = [len(tensors[leaf]) for leaf in cls.ranked if leaf in tensors]
            rank, scale = int(settings.get("r") or found[0]), float(settings["scale"])
            said: Any = settings.get("alpha")
            is_exact = said is not None and said / rank == scale
            numbers[path] = rank, said if is_exact else alpha_for(scale, rank)
        return numbers

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
    options = ("use_effective_conv2d", "decompose_both", "decompose_factor")
    neutral = _NEUTRAL | {"rank_dropout_scale"}

    decompose_both: bool = False
    decompose_factor: int = -1

    @classmethod
    def adopted(cls, layers: Mapping[str, AnyUpdate]) -> Mapping[str, AnyUpdate] | None:
        """The updates with the fields that make PEFT cut their layers as they are cut.

        Updates that were read from PEFT have them already.
        """
        found = super().adopted(layers)
        if found is None or all("decompose_factor" in u.stored_settings for u in found.values()):
            return found
        stored = [update.stored_tensors for update in found.values()]
        both, cores = (any(leaf in own for own in stored) for leaf in ("lokr_w1_a", "lokr_t2"))
        firsts = [t for own in stored for leaf, t in own.items() if leaf.startswith("lokr_w1")]
        for factor in (-1, *sorted({size for tensor in firsts for size in tensor.shape})):
            config = cls(
                alpha=1.0, use_effective_conv2d=cores, decompose_both=both, decompose_factor=factor
            )
            cut = {path: config.cut(update) for path, update in found.items()}
            if None not in cut.values():
                return {path: update for path, update in cut.items() if update is not None}
        return None

    def cut(self, update: AnyUpdate) -> AnyUpdate | None:
        """The update with this config's fields, if PEFT has just its tensors under them."""
        stored = update.stored_tensors
        found = {leaf: tuple(t.shape) for leaf, t in stored.items() if leaf != "alpha"}
        ranks = [found[leaf][0] for leaf in self.ranked if leaf in found]
        # Full factors are of any rank that is too high to be low.
        high = max((size for shape in found.values() for size in shape[:2]), default=1)
        config = replace(self, r=ranks[0] if ranks else high)
        known = tuple(size or 0 for size in update.shape)
        # PEFT multiplies the factors of a one-dimensional convolution in another order.
        if not (update.makes_anew and len(known) != 3 and found == config.shapes(known)):
            return None
        own = {name: getattr(config, name) for name in ("r", *self.options)}
        return with_settings(update, **own)

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The tensors of a layer (out, in, *kernel): ``LoKrLayer.update_layer`` of PEFT 0.21."""
        (a, c), (b, d) = (split(size, self.decompose_factor) for size in shape[:2])
        r, kernel, points = self.r, shape[2:], math.prod(shape[2:])
        is_low = self.decompose_both and r < max(a, b) / 2
        first = {"lokr_w1_a": (a, r), "lokr_w1_b": (r, b)} if is_low else {"lokr_w1": (a, b)}
        if r >= max(c, d) / 2:
            return {**first, "lokr_w2": (c, d, *kernel)}
        if self.use_effective_conv2d and points > 1:
            return {**first, "lokr_t2": (r, r, *kernel), "lokr_w2_a": (r, c), "lokr_w2_b": (r, d)}
        return {**first, "lokr_w2_a": (c, r), "lokr_w2_b": (r, d * points)}


def split(size: int, factor: int) -> tuple[int, int]:
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
