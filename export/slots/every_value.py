"""A value for each input of each slot: what a file that has no defaults is to be fed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from lora_fx.export.slots.base_weights import BaseWeights
from lora_fx.export.slots.manifest import Manifest
from lora_fx.export.slots.slot import InvocationSlot, TensorSlot

Values = Mapping[str, torch.Tensor]
_NONE: Values = MappingProxyType({})


def every_value(manifest: Manifest, model: Path, values: Values = _NONE) -> dict[str, torch.Tensor]:
    """An adapter's values, and beside them what leaves the base as it is.

    Whole tensors are the base's own. Factors of no rank become zeros of rank 1: some runtimes take
    no tensor without values.

    Args:
        manifest: of the model.
        model: its file.
        values: the adapter's, by the names of the inputs; by default there is none.
    """
    base = BaseWeights(model)
    found: dict[str, torch.Tensor] = {}
    for slot in manifest.slots:
        own = slot.neutral() | {name: values[name] for name in slot.names if name in values}
        if isinstance(slot, TensorSlot) and slot.path not in own:
            own[slot.path] = base.tensor(slot.path, slot.shape, slot.digest)
        if not isinstance(slot, InvocationSlot):  # no tokens: everywhere
            own |= {
                given.name: torch.zeros(given.sized(1), dtype=own[given.name].dtype)
                for given in slot.inputs.values()
                if not own[given.name].numel()
            }
        found |= own
    return found
