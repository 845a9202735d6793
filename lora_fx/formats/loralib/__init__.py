"""loralib's state dicts: ``<module>.lora_A`` beside ``<module>.lora_B``, and no scale."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.scaling import checked_alpha
from lora_fx.errors import AdapterError, within
from lora_fx.formats.hints import Hints, check_all_used, value_for
from lora_fx.formats.loralib.keys import check_base, sort_loralib
from lora_fx.formats.loralib.layers import update_of
from lora_fx.formats.loralib.write import ALPHAS, FUSED, PICKLES, contents
from lora_fx.io.state_dict import metadata_of, read_file, write_file
from lora_fx.io.strict_json import parse_object
from lora_fx.layers.base_layers import layers_of
from lora_fx.layers.layer import Layer


def is_loralib(path: Path, names: Collection[str]) -> bool:
    """Whether a file's tensors are named as loralib's."""
    return any(name.endswith((".lora_A", ".lora_B")) for name in names)


def read_loralib(path: Path, name: str, hints: Hints) -> Adapter:
    """Reads what ``loralib.lora_state_dict`` gave: every key is used, or refused by name.

    Linear, embedding and convolution layers. Fused layers (``MergedLinear``) become one pair that
    computes the same, with zeros where nothing is adapted; their scale is still alpha over the
    rank of one output.

    A whole ``state_dict()`` is read too. The weights that loralib adapts are frozen, so they are
    the base's (in evaluation mode with the update merged into them); its other tensors replace
    the base's, but where ``base`` is given and has the same.

    Args:
        path: the file.
        name: of the adapter.
        hints: ``alpha`` is needed, but for a file that was written here; ``r`` is checked;
            ``enable_lora`` says what is fused; ``base`` says which layers can be, and is needed
            for convolutions, whose kernel nothing else tells but their weight in the file.

    Raises:
        AdapterError: names the file, the tensor or hint, and what is wrong with it.
    """
    tensors, texts = read_file(path, hints.allow_pickle), metadata_of(path)
    base = layers_of(hints.base)
    with within(path):
        file = sort_loralib(tensors, base)
        alphas = _alphas(texts, hints, file.layers)
        hints = replace(hints, enable_lora=_fused(texts, hints, file.layers))
        layers = {m: _layer(m, file.weights.get(m), base.get(m)) for m in file.layers}
        tables = {module for module, own in base.items() if own.is_matrix and own.type.reads_ids}
        updates = {
            module: update_of(module, pair, layers[module], alphas[module], hints, module in tables)
            for module, pair in file.layers.items()
        }
    for module, weight in file.weights.items():
        layer = layers[module]
        if hints.base is not None and layer is not None:
            check_base(path, module, updates[module], weight, layer, base, hints.strict)
    return Adapter(name, updates, file.replacements)


def write_loralib(adapter: Adapter, path: Path, hints: Hints, force: bool) -> None:
    """Writes a state dict that a model of loralib's layers loads.

    Tensors that loralib wrote are written as they were; another product of two factors becomes
    that of its ``Linear``, ``Embedding`` or ``Conv2d`` layer. A ``.pt`` holds the tensors alone,
    so all layers must have one alpha, which the reader has to know, as it has to know what is
    fused; a ``.safetensors`` holds both in its metadata. rsLoRA becomes the alpha that gives its
    scale over the rank.

    Args:
        adapter: what to write; besides updates it may replace biases.
        path: ends in ``.pt``, ``.pth``, ``.bin`` or ``.safetensors``.
        hints: none is heeded.
        force: replace a file that is there.

    Raises:
        AdapterError: the target exists, or the format cannot hold the adapter.
    """
    with within(path):
        tensors, metadata = contents(adapter, path.suffix)
    write_file(path, tensors, metadata, force, PICKLES)


def _layer(module: str, weight: torch.Tensor | None, base: Layer | None) -> tuple[int, ...] | None:
    """(out, in / groups, *kernel) of a layer, from the base or from the file; None if unknown."""
    if base is not None and not (base.is_matrix and base.in_files):
        raise AdapterError(
            f"{module} is of a {base.name}; linear, embedding and convolution layers are supported"
        )
    if base is not None or weight is None:
        return None if base is None else base.own_shape
    # Of a matrix the pair tells more: an embedding's and some linear layers' are turned.
    return tuple(weight.shape) if weight.ndim > 2 else None


def _fused(texts: Mapping[str, str], hints: Hints, paths: Iterable[str]) -> Any:
    """What is fused, from the hint or the file."""
    text, given = texts.get(FUSED), hints.enable_lora
    if text is not None:
        if given is not None:
            raise AdapterError("says what is fused; leave the hint enable_lora out")
        with within(FUSED):
            return parse_object(text.encode())
    if isinstance(given, Mapping):
        check_all_used("enable_lora", given, paths)
    return given


def _alphas(texts: Mapping[str, str], hints: Hints, paths: Collection[str]) -> dict[str, float]:
    """The alpha of each layer, from the hint or the file: one for all, or by the end of a path."""
    text = texts.get(ALPHAS)
    given: object = hints.alpha
    if text is not None:
        if given is not None:
            raise AdapterError("says what alpha is; leave the hint alpha out")
        with within(ALPHAS):
            given = parse_object(text.encode())
    if given is None:
        raise AdapterError(
            "loralib stores no alpha, so the scale is unknown; pass alpha=, the "
            "lora_alpha of the layers"
        )
    if not isinstance(given, Mapping):
        return dict.fromkeys(paths, checked_alpha("alpha", given))
    check_all_used("alpha", given, paths)
    by_end = {name: checked_alpha(f"alpha[{name!r}]", alpha) for name, alpha in given.items()}
    alphas = {}
    for path in paths:
        alpha = value_for(by_end, path)
        if alpha is None:
            raise AdapterError(f"{path}: no alpha is given for this layer; add it to alpha=")
        alphas[path] = alpha
    return alphas
