"""What PEFT before 0.3 wrote, as PEFT writes it today."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lora_fx.adapters.scaling import is_number
from lora_fx.errors import AdapterError
from lora_fx.formats.loralib.layers import block_diagonal, checked_groups

_FUSED, _UP = "enable_lora", ".lora_B.weight"
# Of these, when a trainer merged says nothing about the result.
_FIELDS = {_FUSED, "merge_weights"}


def fields_of_today(fields: Mapping[str, object]) -> Mapping[str, object]:
    """The fields of a config: of what ``enable_lora`` adapts, all ranks are of one pair.

    The scale, alpha / r, stays as it is.
    """
    known = {name: value for name, value in fields.items() if name not in _FIELDS}
    count = sum(checked_groups(fields[_FUSED])) if fields.get(_FUSED) else 1
    numbers = {name: known.get(name) for name in ("r", "lora_alpha")}
    return known | {name: n * count for name, n in numbers.items() if is_number(n)}


def tensors_of_today(
    fields: Mapping[str, object], tensors: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """The tensors: outputs that are adapted each by ranks of its own get one up-projection.

    ``lora_B`` (rows * adapted, r, 1) becomes (out, r * adapted), with a block for each output.
    Source: ``MergedLinear`` of PEFT 0.2.0, which loralib has too.
    """
    if not fields.get(_FUSED):
        return tensors
    groups = checked_groups(fields[_FUSED])
    result = dict(tensors)
    for key, up in tensors.items():
        if not key.endswith(_UP):
            continue
        if up.ndim != 3 or up.shape[2] != 1 or len(up) % sum(groups):
            raise AdapterError(
                f"{key} is {tuple(up.shape)}, expected (rows of {sum(groups)} outputs, r, 1): "
                f"{_FUSED} is {list(groups)}"
            )
        result[key] = block_diagonal(up.squeeze(2), groups)
    return result
