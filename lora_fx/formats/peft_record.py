"""A PEFT config as a typed record: what decides ranks, scales and uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_fx.adapters.scaling import scale_of
from lora_fx.adapters.target_rule import TargetRule, pattern_value
from lora_fx.formats.peft_records import NoOptions
from lora_fx.formats.peft_type import PeftType


@dataclass(frozen=True)
class PeftConfig:
    """The fields of a PEFT config that decide what the adapter computes.

    Attributes:
        type: the type of the config.
        r: rank where ``rank_pattern`` names none; AdaLoRA's before the pruning.
        alpha: alpha where ``alpha_pattern`` names none.
        use_rslora: scale by alpha / sqrt(r).
        rank_pattern: regex of a path -> rank.
        alpha_pattern: regex of a path -> alpha.
        lora_bias: the up-projections have biases.
        bias: ``"none"``, ``"lora_only"`` (of adapted layers) or ``"all"``.
        modules_to_save: ends of paths of modules stored whole.
        optional_heads: those of them that the model need not have.
        rule: which modules the adapter acts on, or None where the config leaves that to PEFT.
        use_dora: every layer has a magnitude.
        target_parameters: ends of paths of parameters that are adapted.
        tokens: end of a table's path -> its trained tokens, or those of any table, or None.
        ties: what is adapted or stored of an embedding is stored of the head tied to it too.
        masks: AdaLoRA's, path -> which of the r are left.
        options: the record of what only that type has.
    """

    type: PeftType
    r: int = 0
    alpha: float = 0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    lora_bias: bool = False
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    optional_heads: frozenset[str] = frozenset()
    rule: TargetRule | None = None
    use_dora: bool = False
    target_parameters: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] | tuple[int, ...] | None = None
    ties: bool = False
    masks: Mapping[str, Sequence[bool]] = field(default_factory=dict)
    options: Any = field(default_factory=NoOptions)

    def rank_and_scale(self, path: str) -> tuple[int, float]:
        """The rank and the scale of the module at a path, after both patterns."""
        rank = pattern_value(self.rank_pattern, path, self.r)
        rank = sum(self.masks[path]) if path in self.masks else rank
        return rank, scale_of(self.alpha_of(path), rank, self.use_rslora) if rank else 0.0

    def alpha_of(self, path: str) -> float:
        """The alpha of the module at a path."""
        return pattern_value(self.alpha_pattern, path, self.alpha)

    @property
    def leaves(self) -> tuple[str, ...]:
        """The ends of the keys that this config gives a use."""
        off = {"lora_B.bias": not self.lora_bias, "lora_magnitude_vector": not self.use_dora}
        return tuple(leaf for leaf in self.type.leaves if not off.get(leaf))
