"""One rank and one alpha for an adapter, and patterns for the layers that differ."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.adapters.updates import Update
from lora_fx.errors import AdapterError, shorten
from lora_fx.formats.alphas import alpha_for
from lora_fx.formats.peft_chosen import Chosen
from lora_fx.formats.peft_options import settings_of, tensors_of
from lora_fx.formats.peft_paths import Home
from lora_fx.formats.peft_types import LORA

Numbers = dict[str, float]


def ranks_of(chosen: Chosen, homes: Mapping[str, Home]) -> dict[str, object]:
    """The most common rank and alpha, and patterns for the layers that differ.

    Raises:
        AdapterError: an output projection differs from the attention module that it is in.
    """
    ranks, alphas = _numbers(chosen)
    inside = {path: path.rpartition(".")[0] for path in chosen.layers if not homes[path].asked}
    odd = [p for p, o in inside.items() if (ranks[p], alphas[p]) != (ranks[o], alphas[o])]
    if odd:
        raise AdapterError(
            f"PEFT has one rank and one alpha for an attention module and its output "
            f"projection, but these differ: {shorten(odd)}"
        )
    asked = {home.asked: path for path, home in homes.items() if home.asked}
    rank = _most_common(ranks[path] for path in asked.values())
    alpha = _most_common(alphas[path] for path in asked.values())
    return {
        chosen.type.rank[0] if chosen.type.rank else "r": rank,
        str(chosen.type.alpha): alpha,
        "rank_pattern": _pattern({name: ranks[path] for name, path in asked.items()}, rank),
        "alpha_pattern": _pattern({name: alphas[path] for name, path in asked.items()}, alpha),
    }


def is_rslora(update: AnyUpdate) -> bool:
    """Whether the scale of an update is alpha / sqrt(r)."""
    return update.kind == "rslora" or bool(settings_of(update).get("use_rslora"))


def _numbers(chosen: Chosen) -> tuple[Numbers, Numbers]:
    """Rank and alpha of each layer; the alpha that its file had, where that gives its scale."""
    is_lora = chosen.type is LORA
    use_rslora = is_lora and all(map(is_rslora, chosen.layers.values()))
    ranks: Numbers = {}
    alphas: Numbers = {}
    for path, update in chosen.layers.items():
        rank, scale = _rank_and_scale(update, chosen)
        said: Any = settings_of(update).get("alpha")
        is_exact = not is_lora and said is not None and said / rank == scale
        divisor = math.sqrt(rank) if use_rslora else rank
        ranks[path] = rank
        alphas[path] = said if is_exact else alpha_for(scale, divisor)
    return ranks, alphas


def _rank_and_scale(update: AnyUpdate, chosen: Chosen) -> tuple[int, float]:
    if chosen.type is LORA and isinstance(update, Update):
        return update.rank, update.scale
    settings, tensors = settings_of(update), tensors_of(update)
    found = [len(tensors[leaf]) for leaf in chosen.type.ranked if leaf in tensors]
    return int(settings["r"] if "r" in settings else found[0]), float(settings["scale"])


def _pattern(values: dict[str, float], default: float) -> dict[str, float]:
    """The values that are not the default; PEFT matches ends of paths, the ``^`` whole ones."""
    return {f"^{re.escape(p)}": value for p, value in values.items() if value != default}


def _most_common(values: Iterable[float]) -> float:
    [(value, _)] = Counter(values).most_common(1)
    return value
