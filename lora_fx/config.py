"""What a fresh, trainable adapter is made from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeGuard

import torch

from lora_fx.adapter import Update, check_name
from lora_fx.errors import AdapterError
from lora_fx.safe_regex import compile_bounded
from lora_fx.targets import TargetRule, pattern_value


@dataclass(frozen=True)
class LoraConfig:
    """The options of a new LoRA adapter, by the names that PEFT gives them.

    Attributes:
        r: rank of every update that ``rank_pattern`` does not name.
        alpha: the scale is alpha / r, or alpha / sqrt(r) with ``use_rslora``.
        target_modules: names, a regex, or ``"all-linear"``; see ``TargetRule``.
        dropout: probability of dropping an input of the branch in training, in [0, 1).
        use_rslora: scale by alpha / sqrt(r) (arXiv:2312.03732).
        rank_pattern: regex of a path, or of its end after a dot -> rank.
        alpha_pattern: regex of a path, or of its end after a dot -> alpha.
        exclude_modules: names or a regex of modules to leave alone.
        layers_to_transform: layer indices; with a list of names only.
        layers_pattern: regexes of the segment before the layer index.
        name: tells adapters apart in one graph; an identifier.
        seed: makes the initial values reproducible; None takes torch's global generator.
    """

    r: int = 8
    alpha: float = 16
    target_modules: str | Sequence[str] = "all-linear"
    dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    exclude_modules: str | Sequence[str] = ()
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] = ()
    name: str = "default"
    seed: int | None = None

    def __post_init__(self) -> None:
        """Closes the mappings and checks every option.

        Raises:
            AdapterError: an option of the wrong type or out of range, by name.
        """
        ranks, alphas = checked_ranks(self.rank_pattern), checked_alphas(self.alpha_pattern)
        object.__setattr__(self, "rank_pattern", MappingProxyType(ranks))
        object.__setattr__(self, "alpha_pattern", MappingProxyType(alphas))
        checked_rank("r", self.r)
        checked_alpha("alpha", self.alpha)
        check_name(self.name)
        if not isinstance(self.use_rslora, bool):
            raise AdapterError(f"use_rslora is {self.use_rslora!r}, expected true or false")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise AdapterError(f"dropout is {self.dropout!r}, expected a number in [0, 1)")
        if self.seed is not None and type(self.seed) is not int:
            raise AdapterError(f"seed is {self.seed!r}, expected an integer or None")
        if not self.target_modules:
            raise AdapterError("target_modules is empty: nothing would be adapted")
        _ = self.rule

    @property
    def rule(self) -> TargetRule:
        """Which modules the adapter acts on."""
        return TargetRule(
            self.target_modules, self.exclude_modules, self.layers_to_transform, self.layers_pattern
        )

    def make_generator(self) -> torch.Generator | None:
        """A generator seeded with ``seed``, to be shared by all updates, or None without a seed."""
        return None if self.seed is None else torch.Generator().manual_seed(self.seed)

    def update_for(
        self,
        path: str,
        in_features: int,
        out_features: int,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> Update:
        """Makes the update of one layer, without effect until it is trained.

        As PEFT's default: down is Kaiming-uniform with a = sqrt(5), which is uniform in
        plus or minus 1 / sqrt(in_features), and up is zero.

        Args:
            path: dotted module path, looked up in the patterns.
            in_features: size of the layer's input.
            out_features: size of the layer's output.
            dtype: of the new tensors.
            generator: source of the random values; None takes torch's global one.

        Returns:
            The update: down (r, in_features), up (out_features, r).
        """
        rank = pattern_value(self.rank_pattern, path, self.r)
        alpha = pattern_value(self.alpha_pattern, path, self.alpha)
        down = torch.empty(rank, in_features)
        torch.nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        return Update(
            down=down.to(dtype),
            up=torch.zeros(out_features, rank, dtype=dtype),
            scale=scale_of(alpha, rank, self.use_rslora),
            kind="rslora" if self.use_rslora else "lora",
        )


def scale_of(alpha: float, rank: int, use_rslora: bool) -> float:
    """The scale that an alpha means at a rank: alpha / r, or alpha / sqrt(r) under rsLoRA."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def checked_rank(where: str, rank: object) -> int:
    """Returns a rank, or refuses what is not a positive integer."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise AdapterError(f"{where} is {rank!r:.80}, expected a positive integer")
    return rank


def checked_alpha(where: str, alpha: object) -> float:
    """Returns an alpha, or refuses what is not a finite number."""
    if not _is_number(alpha):
        raise AdapterError(f"{where} is {alpha!r:.80}, expected a finite number")
    return alpha


def checked_ranks(pattern: Mapping[str, object]) -> dict[str, int]:
    """Returns a rank_pattern whose keys are bounded regexes and whose values are ranks."""
    for key in pattern:
        compile_bounded(key, "rank_pattern")
    return {key: checked_rank(f"rank_pattern[{key!r}]", rank) for key, rank in pattern.items()}


def checked_alphas(pattern: Mapping[str, object]) -> dict[str, float]:
    """Returns an alpha_pattern whose keys are bounded regexes and whose values are alphas."""
    for key in pattern:
        compile_bounded(key, "alpha_pattern")
    return {key: checked_alpha(f"alpha_pattern[{key!r}]", a) for key, a in pattern.items()}


def _is_number(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= 1.7976931348623157e308  # false for NaN, and for ints too big for a float
