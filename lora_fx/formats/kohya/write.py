"""An update as the tensors that kohya's scripts and LyCORIS read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.adapters.scaling import alpha_for
from lora_fx.adapters.source_record import SourceRecord, is_embedding
from lora_fx.adapters.updates import Update
from lora_fx.errors import AdapterError
from lora_fx.formats.dialects import ALPHA, check_held, not_lora
from lora_fx.formats.hints import Hints
from lora_fx.formats.kohya.names import FORM, ROLES, algorithm_of, name_of, rank_of_algorithm
from lora_fx.kinds import lora

Tensors = dict[str, torch.Tensor]


def contents(adapter: Adapter, path: Path, hints: Hints) -> tuple[Tensors, dict[str, str]]:
    """A file that kohya's scripts or LyCORIS, and what reads theirs, load.

    What was read from such a file is written as it was. Another product of two factors is LoRA,
    with a magnitude DoRA; rsLoRA becomes the alpha that gives its scale over the rank. An alpha
    that float32 cannot hold is written as float64. ``component`` says what the paths are of
    (``"lycoris"``: of a model that is no part of a pipeline); without, each begins with a part's
    name in a pipeline, such as ``unet.``.
    """
    check_held(adapter, "kohya's format", adapter.replacements, problem_with)
    owners: dict[str, str] = {}
    tensors: Tensors = {}
    for key, update in adapter.updates.items():
        module = module_of(key, update)
        name = name_of(module, adapter.updates, hints.component)
        if owners.setdefault(name, module) != module:
            raise AdapterError(f"{owners[name]} and {module} would both be called {name}")
        tensors |= {f"{name}.{leaf}": t for leaf, t in leaves_for(update).items()}
    return tensors, {}


def module_of(key: str, update: AnyUpdate) -> str:
    """The path of the module that an update is of: a norm's is of one of its parameters."""
    return key.rpartition(".")[0] if update.kind == "norm" else key


def problem_with(update: AnyUpdate) -> str | None:
    """What kohya's format cannot hold of an update, in words, or None."""
    own, scale = _own(update), _scale(update)
    if own is not None:
        is_scaled = rank_of_algorithm(own[0], own[1].tensors) is None and scale != 1
        found = f"a scale of {scale:g} of kind {own[0]!r}" if is_scaled else None
    else:
        found = not_lora(update)
        if found is None and update.groups > 1:
            found = "grouped up-projections"
        if is_embedding(update.stored):
            found = "updates of embeddings"
    return "a scale of 0, which it reads as 1" if found is None and scale == 0 else found


def leaves_for(update: AnyUpdate) -> dict[str, torch.Tensor]:
    """The tensors of an update that the format can hold, by leaf."""
    own = _own(update)
    if own is not None:
        algorithm, stored = own
        rank = rank_of_algorithm(algorithm, stored.tensors)
        return dict(stored.tensors) | _alpha(stored.tensors, _scale(update), rank)
    assert isinstance(update, Update)
    roles = lora.stored(update, FORM)
    leaves = {leaf: roles[role] for leaf, role in ROLES.items() if role in roles}
    return leaves | _alpha({}, update.scale, update.rank)


def _own(update: AnyUpdate) -> tuple[str, SourceRecord] | None:
    """The algorithm and the tensors of an update that LyCORIS wrote, or could have written."""
    stored = update.stored
    algorithm = None if stored is None else algorithm_of(stored.tensors)
    if stored is None or algorithm is None:
        return None
    # PEFT multiplies the full factors of a one-dimensional convolution in another order.
    is_foreign = algorithm == "lokr" and stored.settings.get("writer") != "lycoris"
    second = stored.tensors.get("lokr_w2")
    if is_foreign and second is not None and second.ndim == 3:
        return None
    return algorithm, stored


def _scale(update: AnyUpdate) -> float:
    own = update.scale if isinstance(update, Update) else update.stored_settings.get("scale", 1.0)
    return float(own)


def _alpha(
    stored: Mapping[str, torch.Tensor], scale: float, rank: int | None
) -> dict[str, torch.Tensor]:
    """The alpha that gives a scale: the stored one, if it does, or none if there is no rank."""
    if rank is None:
        return {}
    given = stored.get(ALPHA)
    if ((given.item() if given is not None else 0) or rank) / rank == scale and stored:
        return {}
    return {ALPHA: as_tensor(alpha_for(scale, rank))}


def as_tensor(value: float) -> torch.Tensor:
    """One number as kohya stores it, in float32, or wider if that would change it."""
    narrow = torch.tensor(value, dtype=torch.float32)
    return narrow if narrow.item() == value else torch.tensor(value, dtype=torch.float64)
