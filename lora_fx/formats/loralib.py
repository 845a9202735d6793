"""loralib's state dicts: ``<module>.lora_A`` beside ``<module>.lora_B``, and no scale."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_fx.adapter import Adapter
from lora_fx.errors import AdapterError
from lora_fx.formats.base_layers import BaseLayer, layers_of
from lora_fx.formats.by_end import check_all_used, value_for
from lora_fx.formats.hints import Hints
from lora_fx.formats.loralib_base import check_base
from lora_fx.formats.loralib_file import LoralibFile, sort_keys
from lora_fx.formats.loralib_layers import update_of
from lora_fx.formats.loralib_write import ALPHAS, FUSED, PICKLES, contents
from lora_fx.formats.strict_json import parse_object
from lora_fx.formats.tensor_file import metadata_of, read_file, write_file
from lora_fx.ranks import checked_alpha


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
    file = sort_keys(path, read_file(path, hints), hints.base)
    alphas = _alphas(path, hints, file.layers)
    hints = replace(hints, enable_lora=_fused(path, hints, file.layers))
    base = {} if hints.base is None else layers_of(hints.base)
    updates = {}
    for module, roles in file.layers.items():
        alpha = value_for(alphas, module) if isinstance(alphas, Mapping) else alphas
        if alpha is None:
            raise AdapterError(
                f"{path}: {module}: no alpha is given for this layer; add it to alpha="
            )
        own = base.get(module)
        layer, is_table = _layer(path, module, file, own), own and own.kind == "embedding"
        updates[module] = update_of(path, module, roles, layer, alpha, hints, bool(is_table))
        if hints.base is not None and module in file.weights and layer is not None:
            check_base(path, module, updates[module], file.weights[module], layer, hints)
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
    tensors, metadata = contents(adapter, path)
    write_file(path, tensors, metadata, force, PICKLES)


def _layer(
    path: Path, module: str, file: LoralibFile, base: BaseLayer | None
) -> tuple[int, ...] | None:
    """(out, in / groups, *kernel) of a layer, from the base or from the file; None if unknown."""
    if base is not None and not base.is_matrix:
        raise AdapterError(
            f"{path}: {module} is of a {base.name}; linear, embedding and convolution layers are "
            "supported"
        )
    weight = file.weights.get(module)
    if base is not None or weight is None:
        return None if base is None else base.shape
    # Of a matrix the pair tells more: an embedding's and some linear layers' are turned.
    return tuple(weight.shape) if weight.ndim > 2 else None


def _fused(file: Path, hints: Hints, paths: Iterable[str]) -> Any:
    """What is fused, from the hint or the file."""
    text, given = metadata_of(file).get(FUSED), hints.enable_lora
    if text is not None:
        if given is not None:
            raise AdapterError(f"{file}: says what is fused; leave the hint enable_lora out")
        return parse_object(text.encode(), f"{file}: {FUSED}")
    if isinstance(given, Mapping):
        check_all_used(f"{file}: enable_lora", given, paths)
    return given


def _alphas(file: Path, hints: Hints, paths: Iterable[str]) -> Mapping[str, float] | float:
    """The alpha of all layers, or by the end of a path, from the hint or the file."""
    text = metadata_of(file).get(ALPHAS)
    given: object = hints.alpha
    if text is not None:
        if given is not None:
            raise AdapterError(f"{file}: says what alpha is; leave the hint alpha out")
        given = parse_object(text.encode(), f"{file}: {ALPHAS}")
    if given is None:
        raise AdapterError(
            f"{file}: loralib stores no alpha, so the scale is unknown; pass alpha=, the "
            "lora_alpha of the layers"
        )
    if not isinstance(given, Mapping):
        return checked_alpha("alpha", given)
    check_all_used(f"{file}: alpha", given, paths)
    return {name: checked_alpha(f"alpha[{name!r}]", alpha) for name, alpha in given.items()}
