"""PEFT's tensors and the config that says what they mean: in a directory, or in one file."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.scaling import checked_alpha, checked_rank, is_number
from lora_fx.adapters.target_rule import pattern_matches
from lora_fx.errors import AdapterError, doubt, shorten, within
from lora_fx.formats.dialects import Contents, Tensors
from lora_fx.formats.hints import Hints
from lora_fx.formats.peft import keys
from lora_fx.formats.peft.config import PeftConfig
from lora_fx.formats.peft.keys import PREFIX
from lora_fx.formats.peft.lora import LEAVES, LoraConfig
from lora_fx.formats.peft.types import parse_any, read_tokens
from lora_fx.formats.peft.write import contents
from lora_fx.io.atomic import publish
from lora_fx.io.state_dict import INDEX, metadata_of, read_file, safetensors_of
from lora_fx.io.strict_json import parse_object, read_object
from lora_fx.kinds import lora
from lora_fx.kinds.loralib import block_diagonal, checked_groups
from lora_fx.kinds.validation import measure
from lora_fx.layers.resolve import Names

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
# Where diffusers keeps a LoraConfig in a safetensors file; PEFT itself reads no metadata.
METADATA = "lora_adapter_metadata"
# What PEFT before 0.3 wrote: loralib's outputs that are adapted apart, in one up-projection.
_FUSED, _UP = "enable_lora", ".lora_B.weight"
# Of these, when a trainer merged says nothing about the result.
_FIELDS = {_FUSED, "merge_weights"}


def read_peft(directory: Path, name: str, hints: Hints) -> Adapter:
    """Reads a PEFT adapter: every key of its file is used, or refused by name.

    The base tells what some files leave open: shapes of convolutions, order of parameters, heads.
    """
    origin = _existing(directory, CONFIG)
    fields = read_object(origin)
    with within(origin):
        today = _fields_of_today(fields)
    config = parse_any(today, str(origin), hints.strict)
    weights = weights_in(directory) or _existing(directory, WEIGHTS)
    tensors = keys.unwrapped(read_file(weights, hints.allow_pickle), hints.layers)
    with within(weights):
        tensors = _tensors_of_today(fields, tensors)
    return assemble(name, weights, tensors, config, origin, hints)


def _fields_of_today(fields: Mapping[str, object]) -> Mapping[str, object]:
    """The fields of a config: of what ``enable_lora`` adapts, all ranks are of one pair.

    The scale, alpha / r, stays as it is.
    """
    known = {name: value for name, value in fields.items() if name not in _FIELDS}
    count = sum(checked_groups(fields[_FUSED])) if fields.get(_FUSED) else 1
    numbers = {name: known.get(name) for name in ("r", "lora_alpha")}
    return known | {name: n * count for name, n in numbers.items() if is_number(n)}


def _tensors_of_today(fields: Mapping[str, object], tensors: Tensors) -> Tensors:
    """The tensors: outputs that are adapted each by ranks of its own get one up-projection.

    ``lora_B`` (rows * adapted, r, 1) becomes (out, r * adapted), with a block for each output.
    Source: ``MergedLinear`` of PEFT 0.2.0, which loralib has too.
    """
    if not fields.get(_FUSED):
        return tensors
    groups = checked_groups(fields[_FUSED])
    ups = {key: up for key, up in tensors.items() if key.endswith(_UP)}
    for key, up in ups.items():
        measure({key: up}, {key: ("rows of all outputs", "r", "1")})
    return {**tensors, **{key: block_diagonal(up[..., 0], groups) for key, up in ups.items()}}


def write_peft(adapter: Adapter, directory: Path, hints: Hints, force: bool) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors``, which PEFT loads.

    Updates of one kind are written as PEFT's type of that kind, with the very tensors that they
    were read from. Mixed kinds that all are plain products of two factors (LoRA, VeRA, AdaLoRA,
    LoHa) are written as LoRA of the products' rank; others are refused.
    """
    with within(directory):
        config, tensors = contents(adapter)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        files = {CONFIG: text.encode(), WEIGHTS: safetensors_of(tensors)}
    publish(directory, files, force)


def weights_in(directory: Path) -> Path | None:
    """The file of a directory that holds an adapter's tensors, or the index of several."""
    names = (WEIGHTS, WEIGHTS + INDEX, PICKLE, PICKLE + INDEX)
    return next((directory / name for name in names if (directory / name).exists()), None)


def read_config(path: Path, strict: bool) -> PeftConfig:
    """Reads and checks an ``adapter_config.json``."""
    return parse_any(read_object(path), str(path), strict)


def assemble(
    name: str, weights: Path, tensors: Tensors, config: PeftConfig, origin: Path, hints: Hints
) -> Adapter:
    """Makes an adapter of PEFT's tensors and the config that says what they mean."""
    if not config.kinds:  # PEFT itself is asked, in a room of its own
        from lora_fx.traced_adapters import TracedConfig, read_traced

        assert isinstance(config, TracedConfig)
        return read_traced(name, weights, tensors, config, origin, hints)
    base = hints.layers
    with within(weights):
        own = keys.as_saved(tensors, lambda key: keys.is_own_key(key, config))
        found = keys.sort_peft(own, config, base)
        if base.base is not None and not found.layers.keys() <= base.layers.keys():
            base = Names.of(base).called(found.layers)
        updates, asked = config.read(found.layers, found.shared, base)
        updates |= read_tokens(found.tokens, config, base)
    with within(origin):
        _check_patterns(origin, config, asked, hints.strict)
    return Adapter(name, updates, found.replacements, expects=config.rule)


def _existing(directory: Path, name: str) -> Path:
    path = directory / name
    if not path.is_file():
        below = sorted(other.parent.name for other in directory.glob(f"*/{CONFIG}"))
        told = f"as these in it do: {shorten(below)}; give one of them"
        if not below:  # a model's, an export's
            held = sorted(other.name for other in directory.glob("*"))
            told = f"and this one has {shorten(held, 3) or 'nothing'}: give an adapter's"
        raise AdapterError(
            f"{path}: no such file; a PEFT adapter is a directory that holds it, {told}"
        )
    return path


def _check_patterns(origin: Path, config: PeftConfig, paths: list[str], strict: bool) -> None:
    """Refuses a pattern key that means no adapted module: a misspelt one changes the scale."""
    for field, pattern in config.patterns().items():
        unused = [key for key in pattern if not any(pattern_matches(key, path) for path in paths)]
        if unused:
            said = f"{field} has keys that match no adapted module: {shorten(unused)}"
            doubt(origin, said, "; correct them, or pass strict=False", strict)


def read_peft_file(path: Path, name: str, hints: Hints) -> Adapter:
    """Reads PEFT's tensors from one file.

    The config is the one in the file's metadata; else, for an ``adapter_model`` file, the
    ``adapter_config.json`` beside it; else it is made of the hints ``alpha``, ``use_rslora``
    and ``r``.
    """
    tensors = keys.unwrapped(read_file(path, hints.allow_pickle), hints.layers)
    config, origin = _stored_config(path, hints)
    given = hints.alpha is not None or hints.r is not None or hints.use_rslora
    if config is not None and given:
        raise AdapterError(f"{origin}: says what alpha, r and use_rslora are; give no such hint")
    if config is None:
        with within(path):
            modules = sorted(keys.saved_in(tensors))
            tensors = keys.as_saved(tensors, lambda key: keys.is_own_key(key, LoraConfig))
            config = _from_hints(tensors, hints, modules)
    return assemble(name, path, tensors, config, origin, hints)


def file_contents(adapter: Adapter, path: Path, hints: Hints) -> Contents:
    """PEFT's tensors, and the config in the metadata."""
    config, tensors = contents(adapter)
    return tensors, {METADATA: json.dumps(config, sort_keys=True)}


def fields_in(path: Path) -> Mapping[str, object] | None:
    """The fields in a file's metadata, or None."""
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


def _from_hints(tensors: Tensors, hints: Hints, modules: Sequence[str]) -> PeftConfig:
    """A config of the hints; the ranks are those of the tensors, the modules are held whole."""
    if hints.alpha is None:
        raise AdapterError(
            "holds no config, so the scale is unknown; pass alpha=, the lora_alpha it was "
            "trained with, and use_rslora=True if it was"
        )
    alpha = checked_alpha("alpha", hints.alpha)
    dialect = keys.dialect_of(LoraConfig(lora_alpha=alpha))
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
        lora_bias=any(key.endswith(f".{LEAVES[lora.BIAS]}") for key in tensors),
        use_dora=any(key.endswith(f".{LEAVES[lora.MAGNITUDE]}") for key in tensors),
    )
