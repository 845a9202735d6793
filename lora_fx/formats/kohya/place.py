"""The updates of a file of kohya's kind, each at the layers of the base that it is of."""

from __future__ import annotations

from collections.abc import Mapping

from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.adapters.row_blocks import swapped
from lora_fx.adapters.settle import divided, place
from lora_fx.errors import AdapterError, within
from lora_fx.formats.kohya.algorithms import DOWN_KEY, MID, ROLES, UP_KEY
from lora_fx.formats.kohya.read import updates_of
from lora_fx.formats.layer_tensors import Layers, Roles
from lora_fx.layers.base_layers import BaseLayers
from lora_fx.layers.meanings import Meaning
from lora_fx.layers.resolve import Size


def size_of(roles: Roles) -> Size:
    """(out, in, *kernel) of the layer that tensors are of, as far as they tell it alone."""
    if "diff" in roles:
        return tuple(roles["diff"][1].shape)
    if not ROLES.keys() <= roles.keys():
        return ()
    down, up = roles[DOWN_KEY][1], roles[UP_KEY][1]
    return up.shape[0], *down.shape[1 : 2 if MID in roles else None]


def placed(layers: Layers, meant: Mapping[str, Meaning], base: BaseLayers) -> dict[str, AnyUpdate]:
    """The updates of a file, by the paths of the base.

    Args:
        layers: name -> tensors by leaf.
        meant: name -> the layers that it is of.
        base: their owner.

    Raises:
        AdapterError: tensors of several algorithms, of another layer, or of wrong shapes; or two
            names are of one layer.
    """
    updates: dict[str, AnyUpdate] = {}
    vectors: dict[str, AnyUpdate] = {}
    for name, roles in layers.items():
        meaning = meant[name]
        with within(name):
            layer = meaning.layer(base, (size_of(roles) or (None,))[0])
            for key, update in updates_of(roles, layer).items():
                if key:
                    vectors |= _of_vectors(meaning, key, update, base)
                else:
                    updates[name] = update
    return place(updates, {name: meant[name] for name in updates}, base) | vectors


def _of_vectors(
    meaning: Meaning, key: str, update: AnyUpdate, base: BaseLayers
) -> dict[str, AnyUpdate]:
    """An update of the biases of several layers, or of a norm's vectors."""
    if not meaning.is_all:
        raise AdapterError(f"is of a part of {meaning.layers[0]}, whose {key} it cannot change")
    whole = swapped(update) if meaning.halves_swapped else update
    parts = divided(whole, meaning.layers, base)
    return {f"{path}.{key}": part for path, part in parts.items()}
