"""VeRA's shared projections: from the file, or drawn again as PEFT drew them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.adapters.updates import Update
from lora_fx.errors import AdapterError
from lora_fx.formats.peft_record import PeftConfig
from lora_fx.formats.peft_replaced import SortedKeys
from lora_fx.layers.base_layers import BaseLayers


def projections(
    keys: SortedKeys, config: PeftConfig, base: BaseLayers
) -> Mapping[str, torch.Tensor]:
    """``vera_A`` (r, widest in) and ``vera_B`` (widest out, r) of all layers of a file.

    A file saved with ``save_projection=False`` holds their seed. They are as wide as the widest
    layer that is adapted, which only the base tells.

    Args:
        keys: of the file.
        config: holds ``save_projection`` and ``projection_prng_key``.
        base: tells how wide the layers are.

    Raises:
        AdapterError: they are in the file or not, against what the config says; or there is a seed
            and no base.
    """
    saved = config.options.save_projection
    if sorted(keys.shared) != (["vera_A", "vera_B"] if saved else []):
        raise AdapterError(
            f"holds {sorted(keys.shared) or 'no projection'}, but save_projection is "
            f"{saved}: expected {'vera_A and vera_B' if saved else 'neither vera_A nor vera_B'}"
        )
    if saved:
        return keys.shared
    unknown = [path for path in keys.layers if not base.shape_of(path)]
    if unknown:
        raise AdapterError(
            f"save_projection is False, so the projections are drawn from a seed, as wide "
            f"as the widest layer; pass base=, a model that has {', '.join(unknown[:3])}"
        )
    shapes = [base[path].own_shape for path in keys.layers]
    out, into = max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
    generator = torch.Generator().manual_seed(config.options.projection_prng_key)
    down = _drawn(config.r, into, generator)
    return {"vera_A": down, "vera_B": _drawn(out, config.r, generator)}


def _drawn(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Kaiming-uniform values, by PEFT's own order of rounding."""
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)


def shared_by(layers: Mapping[str, AnyUpdate]) -> Mapping[str, torch.Tensor] | None:
    """The projections that all updates were read with, or None where they are of several files.

    They are cut to the widest of these layers, as PEFT wants them, should a wider one be gone.
    """
    every = [update.stored.tensors for update in layers.values() if update.stored is not None]
    first = every[0]
    for leaf in ("vera_A", "vera_B"):
        if any(leaf not in tensors or not _same(tensors[leaf], first[leaf]) for tensors in every):
            return None
    out, into = _widest(layers)
    return {"vera_A": first["vera_A"][:, :into], "vera_B": first["vera_B"][:out]}


def is_drawn_again(layers: Mapping[str, AnyUpdate]) -> bool:
    """Whether PEFT draws the projections of these layers again from the seed that they came from.

    Not if layers are gone: what is drawn is as wide as the widest.
    """
    for update in layers.values():
        if update.stored is None or update.stored.settings.get("save_projection", True):
            return False
        tensors = update.stored.tensors
        if _widest(layers) != (len(tensors["vera_B"]), tensors["vera_A"].shape[1]):
            return False
    return True


def _widest(layers: Mapping[str, AnyUpdate]) -> tuple[int, int]:
    shapes = [update.shape for update in layers.values() if isinstance(update, Update)]
    return max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or (one.shape == other.shape and torch.equal(one, other))
