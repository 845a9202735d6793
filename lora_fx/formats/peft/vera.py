"""VeRA as PEFT stores it: its projections are in the file, or drawn again as PEFT drew them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.adapters.scaling import checked_rank
from lora_fx.adapters.updates import with_settings
from lora_fx.errors import AdapterError
from lora_fx.formats.peft.config import PeftConfig, Tensors, agreed
from lora_fx.formats.peft.fields import checked, words
from lora_fx.layers.base_layers import BaseLayers

_SHARED = ("vera_A", "vera_B")


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

    def rank_of(self, path: str) -> int:
        """The rank of every layer."""
        return self.r

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
        generator = torch.Generator().manual_seed(self.projection_prng_key)
        down = _drawn(self.r, into, generator)
        return {"vera_A": down, "vera_B": _drawn(out, self.r, generator)}

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


def _drawn(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Kaiming-uniform values, by PEFT's own order of rounding."""
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)


def _shared_by(layers: Mapping[str, AnyUpdate]) -> Tensors | None:
    """The projections that all updates were read with, or None where they are of several files.

    They are cut to the widest of these layers, as PEFT wants them, should a wider one be gone.
    """
    first, *others = (update.stored_tensors for update in layers.values())
    if not all(torch.equal(own[leaf], first[leaf]) for own in others for leaf in _SHARED):
        return None
    out, into = (max(update.shape[axis] or 0 for update in layers.values()) for axis in (0, 1))
    return {"vera_A": first["vera_A"][:, :into], "vera_B": first["vera_B"][:out]}
