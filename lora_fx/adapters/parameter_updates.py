"""Updates of a parameter, which PEFT's ``target_parameters`` counts as it is stored.

``W + scale * up @ down`` has the axes of W there, so that down is of the outputs where a layer
stores its weight as (in, out). Such an update says which parameter it is of, and, once it was
brought into the layer's own shape, that it was turned.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lora_fx.adapters.other_updates import WeightUpdate, added_to_each
from lora_fx.adapters.source_record import DEPTH, PARAMETER, TURNED, SourceRecord
from lora_fx.adapters.updates import AnyUpdate, Update

DOWN, UP = "lora_A.weight", "lora_B.weight"
TURNED_EXPERTS = "transposed"  # whether each expert is stored as (in, out)


def name_of(update: AnyUpdate) -> str | None:
    """The name of the parameter that an update is of, or None where a module's layer is meant."""
    return update.stored_settings.get(PARAMETER)


def for_transposed(update: Update) -> Update:
    """An update in the shape (out, in) of a layer that stores its weight as (in, out)."""
    return update if name_of(update) is None or _is_turned(update) else _swapped(update)


def for_parameter(update: Update) -> Update:
    """An update in the shape of the parameter that it is of; others as they are."""
    return _swapped(update) if _is_turned(update) else update


def of_parameter(update: Update, name: str, transposed: bool) -> Update:
    """An update of a layer that says which parameter it is of, and whether that is transposed."""
    settings: dict[str, object] = {PARAMETER: name, DEPTH: 0}
    return replace(
        update, stored=SourceRecord({}, settings | ({TURNED: True} if transposed else {}))
    )


def of_experts(
    left: torch.Tensor, right: torch.Tensor, stored: SourceRecord | None
) -> WeightUpdate:
    """``W[e] + left[e] @ right[e]`` for every e, and what PEFT's file of it holds.

    Args:
        left: (experts, rows, r), of W as the model stores it.
        right: (experts, r, columns).
        stored: of the update that they take the place of.
    """
    shape = (len(left), left.shape[1], right.shape[2])
    record = None
    if stored is not None and PARAMETER in stored.settings:
        down, up = (left.mT, right.mT) if stored.settings.get(TURNED_EXPERTS) else (right, left)
        # The experts of down one after the other; the columns of one rank of up beside each other.
        tensors = {DOWN: down.flatten(0, 1), UP: up.permute(1, 2, 0).flatten(1)}
        settings = {**stored.settings, "r": right.shape[1], "scale": 1.0, "use_rslora": False}
        record = SourceRecord({n: t.contiguous() for n, t in tensors.items()}, settings)
    return WeightUpdate("lora", added_to_each(left, right), shape, record)


def _is_turned(update: Update) -> bool:
    return update.stored_settings.get(TURNED) is True


def _swapped(update: Update) -> Update:
    assert update.stored is not None
    settings = {**update.stored.settings, TURNED: not _is_turned(update)}
    stored = SourceRecord(update.stored.tensors, settings)
    return replace(turned_round(update), stored=stored)


def turned_round(update: Update) -> Update:
    """The update of the transpose of the weight."""
    down, up = update.up.t().contiguous(), update.down.t().contiguous()
    return replace(update, down=down, up=up, row=update.col, col=update.row)
