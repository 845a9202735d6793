"""PEFT's tensors in one file, whose config is in it, beside it, or known to the caller."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.scaling import checked_alpha, checked_rank
from lora_fx.errors import AdapterError, within
from lora_fx.formats.hints import Hints
from lora_fx.formats.peft import CONFIG, WEIGHTS, assemble, read_config
from lora_fx.formats.peft.config import PeftConfig
from lora_fx.formats.peft.keys import PREFIX, dialect_of, is_own_key
from lora_fx.formats.peft.lora import MAGNITUDE, UP_BIAS, LoraConfig
from lora_fx.formats.peft.state_dicts import as_saved, saved_in
from lora_fx.formats.peft.traced import parse_any
from lora_fx.formats.peft.write import contents
from lora_fx.io.state_dict import metadata_of, read_file, write_file
from lora_fx.io.strict_json import parse_object

# Where diffusers keeps a LoraConfig in a safetensors file; PEFT itself reads no metadata.
METADATA = "lora_adapter_metadata"


def is_peft_file(path: Path, names: Collection[str]) -> bool:
    """Whether a file's tensors have PEFT's prefix."""
    return any(name.startswith(PREFIX) for name in names)


def read_peft_file(path: Path, name: str, hints: Hints) -> Adapter:
    """Reads PEFT's tensors from one file.

    The config is the one in the file's metadata; else, for an ``adapter_model`` file, the
    ``adapter_config.json`` beside it; else it is made of the hints ``alpha``, ``use_rslora``
    and ``r``.

    Args:
        path: the file.
        name: of the adapter.
        hints: ``strict`` and ``allow_pickle`` are heeded too.

    Raises:
        AdapterError: names the file, the tensor or field, and what is wrong with it.
    """
    tensors: Mapping[str, torch.Tensor] = read_file(path, hints.allow_pickle)
    config, origin = _stored_config(path, hints)
    given = hints.alpha is not None or hints.r is not None or hints.use_rslora
    if config is not None and given:
        raise AdapterError(f"{origin}: says what alpha, r and use_rslora are; give no such hint")
    if config is None:
        with within(path):
            modules = sorted(saved_in(tensors))
            tensors = as_saved(tensors, lambda key: is_own_key(key, LoraConfig))
            config = _from_hints(tensors, hints, modules)
    return assemble(name, path, tensors, config, origin, hints)


def write_peft_file(adapter: Adapter, path: Path, hints: Hints, force: bool) -> None:
    """Writes PEFT's tensors as one safetensors file, with the config in its metadata.

    Args:
        adapter: what to write.
        path: ends in ``.safetensors``.
        hints: none is heeded.
        force: replace a file that is there.

    Raises:
        AdapterError: the target exists, or PEFT's format cannot express the adapter.
    """
    with within(path):
        config, tensors = contents(adapter)
    write_file(path, tensors, {METADATA: json.dumps(config, sort_keys=True)}, force)


def fields_in(path: Path) -> Mapping[str, object] | None:
    """The fields in a file's metadata, or None.

    Raises:
        AdapterError: they are no JSON object.
    """
    text = metadata_of(path).get(METADATA)
    if text is None:
        return None
    with within(f"{path}: {METADATA}"):
        return parse_object(text.encode())


def _stored_config(path: Path, hints: Hints) -> tuple[PeftConfig | None, Path]:
    fields = fields_in(path)
    if fields is not None:
        return parse_any(fields, f"{path}: {METADATA}", hints.strict), path
    beside = path.with_name(CONFIG)
    if path.name.partition(".")[0] == Path(WEIGHTS).stem and beside.is_file():
        return read_config(beside, hints.strict), beside
    return None, path


def _from_hints(
    tensors: Mapping[str, torch.Tensor], hints: Hints, modules: Sequence[str]
) -> PeftConfig:
    """A config of the hints; the ranks are those of the tensors, the modules are held whole."""
    if hints.alpha is None:
        raise AdapterError(
            "holds no config, so the scale is unknown; pass alpha=, the lora_alpha it was "
            "trained with, and use_rslora=True if it was"
        )
    alpha = checked_alpha("alpha", hints.alpha)
    dialect = dialect_of(LoraConfig(lora_alpha=alpha))
    split = ((dialect.split(key), tensor) for key, tensor in tensors.items() if tensor.ndim)
    ranks = {found[0]: len(t) for found, t in split if found and found[1] in LoraConfig.ranked}
    common = Counter(ranks.values()).most_common(1)
    rank = hints.r if hints.r is not None else common[0][0] if common else 1
    several = {} if hints.r is not None else {p: r for p, r in ranks.items() if r != rank}
    return LoraConfig(
        r=checked_rank("r", rank),
        lora_alpha=alpha,
        use_rslora=hints.use_rslora,
        rank_pattern={f"^{re.escape(p)}": r for p, r in several.items()},
        modules_to_save=tuple(path.removeprefix(PREFIX) for path in modules),
        lora_bias=any(key.endswith(f".{UP_BIAS}") for key in tensors),
        use_dora=any(key.endswith(f".{MAGNITUDE}") for key in tensors),
    )
