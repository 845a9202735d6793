"""What the reader and the writer need to know of one of PEFT's types of adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_fx.formats.peft_records import NoOptions

# From a `PeftConfig`, a path and the tensors below it; the config knows its type.
Settings = Callable[[Any, str, Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class PeftType:
    """One ``peft_type``.

    Attributes:
        name: ``"LOHA"``.
        kind: of its updates, a key of ``KINDS``; ``"lora"`` is read by `peft_lora`.
        leaves: ends of the keys below a layer's path.
        settings: from the config, a path and the layer's tensors to what the kind wants to know.
        options: the record of the fields that it alone has.
        rank: the field of the rank, and its default.
        alpha: the field of alpha; where it is named, the config has patterns too.
        ranked: the leaves whose first axis is the rank.
        biases: what the field bias may be.
        neutral: fields that say nothing about the result, beside those of all types.
        unsupported: features that would change it.
        own: fields that decide it, which neither all types have nor ``options``.
        targets: fields that choose the modules, beside target_modules.
    """

    name: str
    kind: str
    leaves: tuple[str, ...]
    settings: Settings
    options: type = NoOptions
    rank: tuple[str, int] | None = None
    alpha: str | None = None
    ranked: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    neutral: frozenset[str] = frozenset()
    unsupported: frozenset[str] = frozenset()
    own: frozenset[str] = frozenset()
    targets: frozenset[str] = frozenset(
        {"exclude_modules", "layers_to_transform", "layers_pattern"}
    )
