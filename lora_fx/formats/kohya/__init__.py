"""kohya's files, and LyCORIS': ``lora_unet_<path>.lora_down.weight``, ``.lora_up.weight``, ..."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from lora_fx.adapters.adapter import Adapter
from lora_fx.errors import AdapterError, within
from lora_fx.formats.dialects import ALPHA, Layers, check_no_half, sort_keys
from lora_fx.formats.diffusers.keys import speaks_diffusers
from lora_fx.formats.hints import Hints
from lora_fx.formats.kohya.names import DIALECT, DORA, DOTTED, check_part, find, part_of
from lora_fx.formats.kohya.read import placed, size_of
from lora_fx.formats.peft.keys import PREFIX
from lora_fx.io.state_dict import read_file
from lora_fx.layers.base_layers import layers_of

# Ends of keys that tell such a file, whatever its paths begin with.
_MARKS = tuple(end for end in DOTTED.endings if end not in (".alpha", ".diff_b"))


def is_kohya(path: Path, names: Collection[str]) -> bool:
    """Whether a file's tensors are named as kohya's, or as LyCORIS's, or others' of that kind."""
    if any(part_of(name) for name in names):
        return True
    is_other = (
        any(name.startswith(PREFIX) for name in names) or speaks_diffusers(names) is not False
    )
    return not is_other and any(name.endswith(_MARKS) for name in names)


def read_kohya(path: Path, name: str, hints: Hints) -> Adapter:
    """Reads a file of kohya's or LyCORIS': every key is used, or refused by name.

    LoRA, DoRA, LoCon, LoHa, LoKr, (IA)3, Diag-OFT, full differences and norms. What is added to a
    norm is an update of its parameters, ``<path>.weight`` and ``<path>.bias``. The base is needed,
    for the names are lossy; ``component`` reads one part of a pipeline (unet, te, te1, te2, te3,
    lycoris) and leaves the others out.
    """
    if hints.base is None:
        raise AdapterError(
            f"{path}: kohya's names lose the dots of a path; pass base=, the model or the traced "
            "graph that the adapter is for"
        )
    tensors, base = read_file(path, hints.allow_pickle), layers_of(hints.base)
    with within(path):
        layers = _sorted(tensors, hints.component)
        check_no_half(roles for roles in layers.values() if roles.keys() <= {ALPHA, DORA})
        asked = {name: size_of(roles) for name, roles in layers.items()}
        return Adapter(name, placed(layers, find(asked, base), base), moved={})


def _sorted(tensors: Mapping[str, torch.Tensor], component: str | None) -> Layers:
    """The tensors by layer and leaf."""
    if component is not None:
        check_part(component)
        tensors = {k: t for k, t in tensors.items() if part_of(k) in (None, component)}
    flat = {key: t for key, t in tensors.items() if DIALECT.split(key) or "." not in key}
    layers = sort_keys(flat, DIALECT)
    layers |= sort_keys({k: t for k, t in tensors.items() if k not in flat}, DOTTED)
    if not layers:
        raise AdapterError(f"no layer of {component or 'any part'} in it: nothing is adapted")
    return layers
