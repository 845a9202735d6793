"""Configs of one rank and one alpha, and of patterns for the layers that differ."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.adapters.scaling import checked_rank, scale_of
from lora_fx.adapters.target_rule import pattern_value
from lora_fx.errors import AdapterError, shorten
from lora_fx.formats.peft.config import Fields, PeftConfig
from lora_fx.formats.peft.fields import alphas, checked, ranks
from lora_fx.formats.peft.wrappers import Home

Numbers = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Patterned(PeftConfig):
    """A config whose scale is alpha / r, after both patterns.

    Attributes:
        alpha_field: the name of the field of alpha.
    """

    alpha_field = "alpha"
    r: int = checked(checked_rank, 8, needed=True)
    rank_pattern: Mapping[str, int] = checked(ranks, dict)
    alpha_pattern: Mapping[str, float] = checked(alphas, dict)

    def patterns(self) -> dict[str, Mapping[str, object]]:
        """Both patterns."""
        return {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}

    def rank_of(self, path: str) -> int:
        """The rank of a layer."""
        return pattern_value(self.rank_pattern, path, self.r)

    def alpha_of(self, path: str) -> float:
        """The alpha of a layer."""
        alpha: float = getattr(self, self.alpha_field)
        return pattern_value(self.alpha_pattern, path, alpha)

    def rank_and_scale(self, path: str) -> tuple[int, float]:
        """The rank and the scale of a layer."""
        rank = self.rank_of(path)
        return rank, scale_of(self.alpha_of(path), rank, bool(getattr(self, "use_rslora", False)))

    @classmethod
    def described(cls, layers: Mapping[str, AnyUpdate], homes: Mapping[str, Home]) -> Fields:
        """The most common rank and alpha, and patterns for the layers that differ."""
        layer_ranks, layer_alphas = cls.numbers(layers)
        inside = {path: path.rpartition(".")[0] for path in layers if not homes[path].asked}
        for numbers in (layer_ranks, layer_alphas):
            odd = [path for path, owner in inside.items() if numbers[path] != numbers[owner]]
            if odd:
                raise AdapterError(
                    "PEFT has one rank and one alpha for an attention module and its output "
                    f"projection, but these differ: {shorten(odd)}"
                )
        asked = {home.asked: path for path, home in homes.items() if home.asked}
        rank = _most_common(layer_ranks[path] for path in asked.values())
        alpha = _most_common(layer_alphas[path] for path in asked.values())
        return super().described(layers, homes) | {
            "r": rank,
            cls.alpha_field: alpha,
            "rank_pattern": _pattern({name: layer_ranks[p] for name, p in asked.items()}, rank),
            "alpha_pattern": _pattern({name: layer_alphas[p] for name, p in asked.items()}, alpha),
        }

    @classmethod
    def numbers(cls, layers: Mapping[str, AnyUpdate]) -> tuple[Numbers, Numbers]:
        """Rank and alpha of each layer."""
        raise NotImplementedError


def _pattern(values: dict[str, float], default: float) -> dict[str, float]:
    """The values that are not the default; PEFT matches ends of paths, the ``^`` whole ones."""
    return {f"^{re.escape(p)}": value for p, value in values.items() if value != default}


def _most_common(values: Iterable[float]) -> float:
    [(value, _)] = Counter(values).most_common(1)
    return value
