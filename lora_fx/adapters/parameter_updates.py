"""Updates of a parameter, which PEFT's ``target_parameters`` counts as it is stored.

``W + scale * up @ down`` has the axes of W there, so that down is of the outputs where a layer
stores its weight as (in, out). Such an update says which parameter it is of, and, once it was
brought into the layer's own shape, that it was turned.
"""

from __future__ import annotations

from dataclasses import replace

from lora_fx.adapters.source_record import Stored
from lora_fx.adapters.updates import Update

_NAME, _DEPTH, _TURNED = "parameter", "depth", "turned"


def name_of(update: Update) -> str | None:
    """The name of the parameter that an update is of, or None where a module's layer is meant."""
    return None if update.stored is None else update.stored.settings.get(_NAME)


def for_layer(update: Update, transposed: bool) -> Update:
    """An update in the shape of a layer, (out, in), that stores its weight transposed or not."""
    if not transposed or name_of(update) is None or _is_turned(update):
        return update
    return _swapped(update)


def for_parameter(update: Update) -> Update:
    """An update in the shape of the parameter that it is of; others as they are."""
    return _swapped(update) if _is_turned(update) else update


def of_parameter(update: Update, name: str, transposed: bool) -> Update:
    """An update of a layer that says which parameter it is of, and whether that is transposed."""
    settings: dict[str, object] = {_NAME: name, _DEPTH: 0}
    return replace(update, stored=Stored({}, settings | ({_TURNED: True} if transposed else {})))


def _is_turned(update: Update) -> bool:
    return update.stored is not None and update.stored.settings.get(_TURNED) is True


def _swapped(update: Update) -> Update:
    assert update.stored is not None
    settings = {**update.stored.settings, _TURNED: not _is_turned(update)}
    down, up = update.up.t().contiguous(), update.down.t().contiguous()
    stored = Stored(update.stored.tensors, settings)
    return replace(update, down=down, up=up, row=update.col, col=update.row, stored=stored)
