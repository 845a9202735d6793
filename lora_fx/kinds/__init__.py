"""What a layer's tensors mean, one file a kind of adapter; the formats know whose tensors they are.

To support another kind, add one file with its leaves and its reader, and one line to ``KINDS``.
A reader says what is wrong with the tensors; who calls it says where, by `lora_fx.errors.within`.
LoRA has no line there: formats do not agree on its leaves, so `lora_fx.kinds.lora` reads by role.
What is of one format, loralib's layers, or of a parameter, experts, is called by its own name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lora_fx.adapters.updates import AnyUpdate
from lora_fx.kinds import adalora, full, glora, ia3, loha, lokr, oft, trainable_tokens, vera

Reader = Callable[[Mapping[str, torch.Tensor], Mapping[str, Any]], AnyUpdate]


@dataclass(frozen=True)
class Kind:
    """How one kind of adapter is read.

    Attributes:
        name: ``"loha"``, ...
        leaves: names of the tensors below a layer's path, as PEFT and LyCORIS write them.
        read: from tensors by leaf, and settings, to the update; what it was given stands on its
            ``stored``.
    """

    name: str
    leaves: frozenset[str]
    read: Reader


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("loha", loha.LEAVES, loha.read),
        Kind("lokr", lokr.LEAVES, lokr.read),
        Kind("vera", vera.LEAVES, vera.read),
        Kind("adalora", adalora.LEAVES, adalora.read),
        Kind("ia3", ia3.LEAVES, ia3.read),
        Kind("oft", oft.LEAVES, oft.read),
        Kind("full", full.LEAVES, full.read),
        Kind("glora", glora.LEAVES, glora.read),
        Kind("tokens", trainable_tokens.LEAVES, trainable_tokens.read),
    )
}
