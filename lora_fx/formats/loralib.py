"""loralib's state dicts: ``<module>.lora_A`` beside ``<module>.lora_B``, and no scale."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch

from lora_fx.adapter import Adapter, Update
from lora_fx.config import checked_alpha, checked_rank
from lora_fx.errors import AdapterError, shorten
from lora_fx.formats.alphas import alpha_for
from lora_fx.formats.base_layers import BaseLayer, layers_of
from lora_fx.formats.by_end import check_all_used, value_for
from lora_fx.formats.hints import Hints
from lora_fx.formats.limits import check_matrices_only
from lora_fx.formats.loralib_fused import block_diagonal, groups_of
from lora_fx.formats.pairs import DOWN, UP, Layers, add, check_pairs, matrices_of
from lora_fx.formats.strict_json import parse_object
from lora_fx.formats.tensor_file import metadata_of, read_file, write_file

ROLES = {".lora_A": DOWN, ".lora_B": UP}
BIAS = ".bias"
# A key of the safetensors metadata, ours: loralib keeps alpha in the model's constructor.
ALPHAS = "lora_alpha"
PICKLES = (".pt", ".pth", ".bin")


def is_loralib(path: Path, names: Collection[str]) -> bool:
    """Whether a file's tensors are named as loralib's."""
    return any(name.endswith(tuple(ROLES)) for name in names)


def read_loralib(path: Path, name: str, hints: Hints) -> Adapter:
    """Reads what ``loralib.lora_state_dict`` gave: every key is used, or refused by name.

    Fused layers (``MergedLinear``) become one pair that computes the same, with zeros where
    nothing is adapted; their scale is still alpha over the rank of one output.

    Args:
        path: the file.
        name: of the adapter.
        hints: ``alpha`` is needed, but for a file that was written here; ``r`` is checked;
            ``enable_lora`` says what is fused, and ``base`` which layers can be.

    Raises:
        AdapterError: names the file, the tensor or hint, and what is wrong with it.
    """
    layers, biases = _sorted(path, read_file(path, hints))
    alphas = _alphas(path, hints, layers)
    base = {} if hints.base is None else layers_of(hints.base)
    if isinstance(hints.enable_lora, Mapping):
        check_all_used(f"{path}: enable_lora", hints.enable_lora, layers)
    updates = {p: _update(path, p, layers, hints, alphas, base.get(p)) for p in layers}
    return Adapter(name, updates, biases)


def write_loralib(adapter: Adapter, path: Path, hints: Hints, force: bool) -> None:
    """Writes a state dict that a model of ``loralib.Linear`` layers loads.

    A ``.pt`` holds the tensors alone, so all layers must have one alpha, which the reader has to
    know; a ``.safetensors`` holds each alpha in its metadata. rsLoRA becomes the alpha that gives
    its scale over the rank.

    Args:
        adapter: what to write; besides updates it may replace biases.
        path: ends in ``.pt``, ``.pth``, ``.bin`` or ``.safetensors``.
        hints: none is heeded.
        force: replace a file that is there.

    Raises:
        AdapterError: the target exists, or the format cannot hold the adapter.
    """
    others = [key for key in adapter.replacements if not key.endswith(BIAS)]
    check_matrices_only(adapter, path, "loralib's format", others)
    alphas = {p: alpha_for(update.scale, update.rank) for p, update in adapter.updates.items()}
    if path.suffix in PICKLES and len(set(alphas.values())) > 1:
        found = shorten([f"{p}: {alpha:g}" for p, alpha in alphas.items()])
        raise AdapterError(f"{path}: its layers have several alphas ({found}): write .safetensors")
    tensors = dict(adapter.replacements)
    for module, update in adapter.updates.items():
        tensors |= {f"{module}.lora_A": update.down, f"{module}.lora_B": update.up}
    write_file(path, tensors, {ALPHAS: json.dumps(alphas)}, force, PICKLES)


def _sorted(
    file: Path, tensors: Mapping[str, torch.Tensor]
) -> tuple[Layers, dict[str, torch.Tensor]]:
    layers: Layers = {}
    biases, unused = {}, []
    for key, tensor in tensors.items():
        end = next((end for end in ROLES if key.endswith(end)), None)
        if end is not None and key != end:
            add(file, layers, key.removesuffix(end), ROLES[end], key, tensor)
        elif key.endswith(BIAS):
            biases[key] = tensor
        else:
            unused.append(key)
    if unused:
        raise AdapterError(
            f"{file}: {len(unused)} tensors are no part of an adapter: {shorten(unused)}; expected "
            "<module>.lora_A, <module>.lora_B and biases, as loralib.lora_state_dict(model) gives"
        )
    check_pairs(file, layers)
    return layers, biases


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


def _update(
    file: Path,
    path: str,
    layers: Layers,
    hints: Hints,
    alphas: Mapping[str, float] | float,
    base: BaseLayer | None,
) -> Update:
    if base is not None and base.shape is None:
        raise AdapterError(f"{file}: {path} is of a {base.kind}; only linear layers are supported")
    alpha = value_for(alphas, path) if isinstance(alphas, Mapping) else alphas
    if alpha is None:
        raise AdapterError(f"{file}: {path}: no alpha is given for this layer; add it to alpha=")
    down, up = matrices_of(file, layers[path])
    rank = up.shape[1]
    if hints.r is not None and checked_rank("r", hints.r) != rank:
        raise AdapterError(
            f"{file}: {path}: lora_B {tuple(up.shape)} is of rank {rank}, the hint r is {hints.r}; "
            "a convolution's is a multiple of r, and is not supported"
        )
    groups = groups_of(file, path, down, up, hints, base)
    return Update(down, up if groups is None else block_diagonal(up, groups), alpha / rank)
