"""The other types of PEFT's whose update is a product: AdaLoRA, VeRA, LoHa and LoKr."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.adapters.scaling import alpha_for, checked_alpha, checked_rank
from lora_fx.adapters.updates import with_settings
from lora_fx.errors import AdapterError
from lora_fx.formats.peft import lora
from lora_fx.formats.peft.config import Numbers, Patterned, PeftConfig, Tensors, agreed
from lora_fx.formats.peft.fields import Fields, checked, masks, words
from lora_fx.kinds import lokr
from lora_fx.kinds.vera import drawn
from lora_fx.layers.base_layers import BaseLayers

_SHARED = ("vera_A", "vera_B")
_NEUTRAL = words("rank_dropout module_dropout init_weights")  # of LyCORIS' kinds


@dataclass(frozen=True, kw_only=True)
class AdaloraConfig(PeftConfig):
    """AdaLoRA, whose layers never look at LoRA's fields, whatever the config says of them."""

    peft_type = "ADALORA"
    kinds = ("adalora",)
    leaves = ("lora_A", "lora_B", "lora_E")
    ranked = ("lora_A",)
    rank_field = "init_r"
    only_bias = "lora_only"
    neutral = lora.NEUTRAL | words(
        """r use_rslora alpha_pattern lora_bias init_lora_weights target_r tinit tfinal deltaT beta1
        beta2 orth_reg_weight total_step"""
    )
    refused = lora.REFUSED | words("alora_invocation_tokens use_dora target_parameters")
    # PEFT refuses a config without steps to train; these are never taken.
    written: ClassVar[Fields] = {"total_step": 1, "tinit": 0, "tfinal": 0}

    init_r: int = checked(checked_rank, 12, needed=True)
    lora_alpha: float = checked(checked_alpha, needed=True)
    rank_pattern: Mapping[str, list[bool]] | None = checked(masks, None)

    def rank_of(self, path: str) -> int:
        """What is left of the rank of a layer."""
        mask = self._mask(path)
        return self.init_r if mask is None else sum(mask)

    def _mask(self, path: str) -> list[bool] | None:
        return (self.rank_pattern or {}).get(f"{path}.lora_E")

    def settings(self, path: str, tensors: Tensors) -> Fields:
        """Alpha is the scale, divided by the rank before the pruning."""
        scale = self.lora_alpha if self.lora_alpha > 0 else self.rank_of(path)
        known = {"ranknum": self.init_r, "alpha": self.lora_alpha, "mask": self._mask(path)}
        return {"scale": scale, **known}

    @classmethod
    def described(cls, layers: Mapping[str, AnyUpdate]) -> Fields:
        """Rank and alpha, and what was left of each layer that was pruned."""
        kept = {f"{p}.lora_E": update.stored_settings.get("mask") for p, update in layers.items()}
        return {
            "init_r": int(agreed(layers, "ranknum")),
            "lora_alpha": agreed(layers, "alpha"),
            "rank_pattern": {key: mask for key, mask in kept.items() if mask is not None} or None,
        }


@dataclass(frozen=True, kw_only=True)
class VeraConfig(PeftConfig):
    """VeRA: two vectors a layer, and two projections of all layers."""

    peft_type = "VERA"
    kinds = ("vera",)
    leaves = ("vera_lambda_b", "vera_lambda_d")
    ranked = ("vera_lambda_d",)
    shared_keys: ClassVar[Mapping[str, str]] = {f"base_model.{leaf}": leaf for leaf in _SHARED}
    only_bias = "vera_only"
    lacks = words("exclude_modules trainable_token_indices ensure_weight_tying")
    neutral = words("vera_dropout d_initial fan_in_fan_out init_weights")
    options = ("r", "save_projection", "projection_prng_key")

    r: int = checked(checked_rank, 256, needed=True)
    save_projection: bool = True
    projection_prng_key: int = 0

    def read(
        self, layers: Mapping[str, Tensors], shared: Tensors, base: BaseLayers
    ) -> tuple[dict[str, AnyUpdate], list[str]]:
        """The updates of a file's layers, with the projections beside each."""
        return super().read(layers, self.projections(list(layers), shared, base), base)

    def projections(self, paths: list[str], shared: Tensors, base: BaseLayers) -> Tensors:
        """``vera_A`` (r, widest in) and ``vera_B`` (widest out, r) of all layers of a file.

        A file saved with ``save_projection=False`` holds their seed. They are as wide as the widest
        layer that is adapted, which only the base tells.
        """
        saved = self.save_projection
        if sorted(shared) != (sorted(_SHARED) if saved else []):
            raise AdapterError(
                f"holds {sorted(shared) or 'no projection'}, but save_projection is {saved}: "
                f"expected {'vera_A and vera_B' if saved else 'neither vera_A nor vera_B'}"
            )
        if saved:
            return shared
        unknown = [path for path in paths if not base.shape_of(path)]
        if unknown:
            raise AdapterError(
                f"save_projection is False, so the projections are drawn from a seed, as wide "
                f"as the widest layer; pass base=, a model that has {', '.join(unknown[:3])}"
            )
        shapes = [base[path].own_shape for path in paths]
        out, into = max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
        return drawn(self.r, into, out, self.projection_prng_key)

    @classmethod
    def holds(cls, update: AnyUpdate) -> bool:
        """Whether an update is VeRA's vectors and projections, and no more."""
        is_plain = update.rank is not None and update.is_plain
        return is_plain and update.stored_tensors.keys() == {*cls.leaves, *_SHARED}

    @classmethod
    def adopted(cls, layers: Mapping[str, AnyUpdate]) -> Mapping[str, AnyUpdate] | None:
        """The updates, if all have the same projections, and whether these are to be stored.

        A seed is enough where no layer is gone: what PEFT draws is as wide as the widest.
        """
        found = super().adopted(layers)
        shared = None if found is None else _shared_by(found)
        if found is None or shared is None:
            return None
        is_saved = any(
            update.stored_settings.get("save_projection", True)
            or any(update.stored_tensors[leaf].shape != t.shape for leaf, t in shared.items())
            for update in found.values()
        )
        return {path: with_settings(u, save_projection=is_saved) for path, u in found.items()}

    @classmethod
    def shared_of(cls, layers: Mapping[str, AnyUpdate]) -> dict[str, torch.Tensor]:
        """The projections, if the file is to hold them."""
        found = _shared_by(layers) if agreed(layers, "save_projection") else None
        return {} if found is None else {key: found[leaf] for key, leaf in cls.shared_keys.items()}


def _shared_by(layers: Mapping[str, AnyUpdate]) -> Tensors | None:
    """The projections that all updates were read with, or None where they are of several files.

    They are cut to the widest of these layers, as PEFT wants them, should a wider one be gone.
    """
    first, *others = (update.stored_tensors for update in layers.values())
    if not all(torch.equal(own[leaf], first[leaf]) for own in others for leaf in _SHARED):
        return None
    out, into = (max(update.shape[axis] or 0 for update in layers.values()) for axis in (0, 1))
    return {"vera_A": first["vera_A"][:, :into], "vera_B": first["vera_B"][:out]}


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
        has_cores = any("hada_t1" in update.stored_tensors for update in layers.values())
        return super().described(layers) | ({"use_effective_conv2d": True} if has_cores else {})

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
        own = {name: getattr(self, name) for name in self.options}
        own["r"] = ranks[0] if ranks else high
        known = tuple(size or 0 for size in update.shape)
        # PEFT multiplies the factors of a one-dimensional convolution in another order.
        if not (update.makes_anew and len(known) != 3 and found == lokr.shapes(known, **own)):
            return None
        return with_settings(update, **own)
