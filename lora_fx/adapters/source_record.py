"""The source record of a layer: what its file held, so that it can be written again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from lora_fx.adapters.value import Value


@dataclass(frozen=True, eq=False)
class SourceRecord(Value):
    """The tensors of one layer as their owner spells them, and the settings that they need.

    Attributes:
        tensors: last part of the name (``hada_w1_a``) -> tensor, bit for bit as in the file.
        settings: what else decides the result (``alpha``, ``r``, ...), by the config's own names.
    """

    tensors: Mapping[str, torch.Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Closes the mappings."""
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))


# Of an update of a parameter: its name, how deep it lies, whether its own shape was turned round.
PARAMETER, DEPTH, TURNED = "parameter", "depth", "turned"
# Of an update whose layer is a table of rows: nothing else about it says so.
EMBEDDING = SourceRecord({}, {"layer": "embedding"})
# The base says so, of a file whose format has no word for it.
TOLD_BY_BASE = SourceRecord({}, {**EMBEDDING.settings, "told_by": "base"})


def is_embedding(stored: SourceRecord | None) -> bool:
    """Whether what was stored says that the layer is an embedding."""
    return stored is not None and (
        stored.settings.get("layer") == "embedding" or "lora_embedding_A" in stored.tensors
    )


def is_told(stored: SourceRecord | None) -> bool:
    """Whether that is all that was stored, and the base said so."""
    return stored is not None and "told_by" in stored.settings


def kept(stored: SourceRecord | None) -> SourceRecord | None:
    """What is still true of an update that was made anew: what kind of weight it is of."""
    if is_embedding(stored):
        return EMBEDDING
    if stored is None or PARAMETER not in stored.settings:
        return None
    names = PARAMETER, DEPTH, TURNED
    return SourceRecord({}, {n: stored.settings[n] for n in names if n in stored.settings})
