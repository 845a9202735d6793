"""diffusers' ``pytorch_lora_weights.safetensors``: the adapters of a pipeline's models."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.errors import AdapterError, within
from lora_fx.formats.diffusers.keys import ENDINGS, sort_by_component, speaks_diffusers
from lora_fx.formats.diffusers.read import is_bare, updates_of
from lora_fx.formats.diffusers.write import contents
from lora_fx.formats.hints import Hints
from lora_fx.formats.layer_tensors import Layers
from lora_fx.formats.peft import CONFIG
from lora_fx.formats.peft.keys import PREFIX
from lora_fx.formats.peft.single_file import fields_in
from lora_fx.io.state_dict import read_file, write_file

WEIGHTS = "pytorch_lora_weights.safetensors"


def is_diffusers(path: Path, names: Collection[str]) -> bool:
    """Whether a directory has diffusers' file, or a file is diffusers' by name, keys or metadata.

    Raises:
        AdapterError: its keys may be diffusers' as well as PEFT's, which differ in the scale.
    """
    if path.is_dir():
        return (path / WEIGHTS).exists() and not (path / CONFIG).exists()
    is_lora = any(n.endswith(tuple(ENDINGS)) and not n.startswith(PREFIX) for n in names)
    if is_lora and (path.name == WEIGHTS or is_bare(fields_in(path))):
        return True
    speaks = speaks_diffusers(names)
    if speaks is None and fields_in(path) is None:
        raise AdapterError(
            f"{path}: its keys begin with transformer. and end as PEFT's do, and nothing says what "
            "the scale is: a part of a pipeline has 1 in diffusers' format, a language model that "
            'PEFT trained has alpha / r; pass format="diffusers" for the one, or save the other '
            "with PEFT, which puts base_model.model. in front and a config beside it"
        )
    return speaks is not False


def read_diffusers(path: Path, name: str, hints: Hints) -> Adapter:
    """Reads a file of diffusers': every key is used, or refused by name.

    LoRA and DoRA of linear and convolution layers, and LoKr. Scales come from the config in the
    file's metadata, or from ``.alpha`` tensors over the rank; without either a scale is 1.

    Args:
        path: the file, or the directory that holds ``pytorch_lora_weights.safetensors``.
        name: of the adapter.
        hints: ``component`` reads one model's part and leaves the others out; without, paths keep
            the component's name at the front, as in the pipeline. A file that one model wrote by
            itself (``save_lora_adapter``) has no components.

    Raises:
        AdapterError: names the file, the tensor or field, and what is wrong with it.
    """
    file = path / WEIGHTS if path.is_dir() else path
    fields = fields_in(file)
    bare = is_bare(fields)
    tensors = read_file(file, hints.allow_pickle)
    with within(file):
        components = sort_by_component(tensors, bare)
        if hints.component is not None and not bare:
            components = _chosen(components, hints.component)
    updates: dict[str, AnyUpdate] = {}
    rule = None
    for component, layers in (components or {"": {}}).items():
        found, own_rule = updates_of(file, layers, fields, component, hints.strict)
        if hints.component is not None or bare:
            updates, rule = found, own_rule
        else:
            updates |= {f"{component}.{p}": update for p, update in found.items()}
    return Adapter(name, updates, expects=rule)


def write_diffusers(adapter: Adapter, path: Path, hints: Hints, force: bool) -> None:
    """Writes a file that diffusers' pipelines load, with its ``LoraConfig`` in the metadata.

    Args:
        adapter: what to write.
        path: ends in ``.safetensors``; a pipeline looks for ``pytorch_lora_weights.safetensors``.
        hints: ``component`` says what the paths are of; without, each begins with a component's
            name.
        force: replace a file that is there.

    Raises:
        AdapterError: the target exists, or the format cannot hold the adapter.
    """
    with within(path):
        tensors, metadata = contents(adapter, hints.component)
    write_file(path, tensors, metadata, force)


def _chosen(components: dict[str, Layers], wanted: str) -> dict[str, Layers]:
    if wanted not in tuple(components):
        raise AdapterError(
            f"component is {wanted!r:.80}, the file has {', '.join(components) or 'none'}"
        )
    return {wanted: components[wanted]}
