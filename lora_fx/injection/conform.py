"""Brings an update into the shape of its layer, values unchanged, or refuses."""

from __future__ import annotations

import math
from dataclasses import replace

from lora_fx.adapters.other_updates import anew, evaluated
from lora_fx.adapters.parameter_updates import for_parameter, for_transposed, turned_round
from lora_fx.adapters.updates import NO_WEIGHT, AnyUpdate, Shape, Update
from lora_fx.errors import AdapterError, advised
from lora_fx.layers.layer import Layer


@advised("use the base that it was trained on, or leave it out of the adapter")
def conform(update: AnyUpdate, site: Layer) -> AnyUpdate:
    """Brings an update into the shape of a layer, where that says the same.

    Files store the kernel of a convolution flat, or a linear layer as a convolution of one point.
    What acts on the weight of a grouped convolution has no cheap form beside it: it becomes a
    function of the weight.

    Args:
        update: of any kind.
        site: the layer.

    Raises:
        AdapterError: it is made for another layer, or its kind has no form on this one.
    """
    stored = site.own_shape
    if update.makes_anew:
        is_flat = len(update.shape) == 2
        _check(update.shape, (stored[0], math.prod(stored[1:])) if is_flat else stored)
        return update
    if not isinstance(update, Update):
        return _scaling(update, site)
    if site.transposed and not site.is_conv:
        update = for_transposed(update)
    update = _in_shape(update, site.shape, stored)
    if update.col is not None and site.type.reads_ids:
        raise AdapterError("a col scales what a layer reads, and an embedding reads ids")
    if update.shape == site.shape:
        if site.groups > 1 and update.magnitude is not None:
            raise AdapterError(
                "DoRA on a grouped convolution has no weight to norm; trace the model that PEFT "
                "wraps (lora_fx.trace) instead, and export that"
            )
        return update
    _check(update.shape, stored, rows=int(site.type.reads_ids))
    if not update.is_plain:
        raise AdapterError("vectors beside a grouped convolution's weight have no form")
    return evaluated(update, update.shape, update.stored)


def conform_parameter(update: AnyUpdate, shape: tuple[int, ...]) -> AnyUpdate:
    """Brings an update into the shape of a parameter that no layer alone reads as it is stored.

    It becomes a function of the parameter: what is computed of W is computed of W'.

    Args:
        update: makes its weight anew, or is of low rank.
        shape: of the parameter.

    Raises:
        AdapterError: it is made for another shape, or is more than W' there.
    """
    if isinstance(update, Update):
        update = for_parameter(update)
        if update.shape[::-1] == shape != update.shape and update.magnitude is None:
            update = turned_round(update)
    if update.bias is not None or update.invocation:
        what = (
            NO_WEIGHT if update.invocation else "a bias (lora_bias, diff_b) stands beside a layer"
        )
        raise AdapterError(f"{what}, and this is a parameter that no layer reads as it is")
    sizes = zip(update.shape, shape, strict=False)
    if len(update.shape) != len(shape) or any(want not in (None, size) for want, size in sizes):
        raise AdapterError(
            f"made for a parameter {update.shape}, the model's is {shape}. Use the base that it "
            "was trained on"
        )
    return anew(update)


def fits(update: AnyUpdate, site: Layer) -> bool:
    """Whether `conform` would bring an update into the shape of a layer."""
    try:
        conform(update, site)
    except AdapterError:
        return False
    return True


def _in_shape(update: Update, shape: tuple[int, ...], stored: tuple[int, ...]) -> Update:
    """The same update with its kernel's axes as the layer has them, if the sizes say so."""
    if update.kind == "vera" and update.down.shape[1] > shape[1] and len(shape) == 2:
        # The shared projection is as wide as the widest layer: each reads its first columns.
        update = replace(update, down=update.down[:, : shape[1]])
    points = update.down.ndim == 2 or all(axis == 1 for axis in update.down.shape[2:])
    if update.shape in (shape, stored) or not points or update.col is not None:
        return update
    flat = update.down.flatten(1)
    fits = (wanted for wanted in (shape, stored) if math.prod(wanted[1:]) == flat.shape[1])
    wanted = next(fits, None)
    return update if wanted is None else replace(update, down=flat.reshape(-1, *wanted[1:]))


def _scaling(update: AnyUpdate, site: Layer) -> AnyUpdate:
    if update.shape[1] is not None and site.type.reads_ids:
        raise AdapterError("(IA)3 scales what a layer reads, and an embedding reads ids")
    _check(update.shape, site.shape[:2])
    return update


def _check(found: Shape, wanted: tuple[int, ...], rows: int = 0) -> None:
    same = len(found) == len(wanted)
    if same and all(size in (None, axis) for size, axis in zip(found, wanted, strict=True)):
        return
    raise AdapterError(
        f"made for a layer {_words(found)}, the model's is {_words(wanted)}. "
        f"{remedy(found, wanted, rows)}"
    )


def remedy(found: Shape, wanted: tuple[int, ...], rows: int = 0) -> str:
    """What to do about a shape that is not the model's.

    Args:
        found: of the adapter.
        wanted: of the model.
        rows: the axis of what there may be one of for each token.
    """
    pairs = [*zip(found, wanted, strict=False)]
    differ = [axis for axis, (one, two) in enumerate(pairs) if one not in (None, two)]
    base = "Use the base that it was trained on"
    if len(found) != len(wanted) or differ != [rows] or not found[rows]:
        return base
    return (
        f"{base}; if its vocabulary grew before training, let the base's grow too, "
        f"model.resize_token_embeddings({found[rows]}), before it is traced"
    )


def _words(shape: Shape) -> str:
    out, into, *kernel = ("?" if size is None else str(size) for size in shape)
    return f"{into} -> {out}" + (f", kernel ({', '.join(kernel)})" if kernel else "")
