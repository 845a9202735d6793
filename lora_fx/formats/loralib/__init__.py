"""loralib's state dicts: ``<module>.lora_A`` beside ``<module>.lora_B``, and no scale."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.adapters.scaling import checked_alpha
from lora_fx.errors import AdapterError, within
from lora_fx.formats.dialects import Dialect, Layers, Tensors, check_adapted, sort_keys
from lora_fx.formats.hints import Hints, check_all_used, doubt, value_for
from lora_fx.formats.loralib.layers import ALPHAS, FUSED, update_of
from lora_fx.io.state_dict import metadata_of, read_file
from lora_fx.io.strict_json import parse_object
from lora_fx.kinds.lora import DOWN, UP
from lora_fx.layers.base_layers import BaseLayers, layers_of
from lora_fx.layers.layer import Layer

DIALECT = Dialect(
    {".lora_A": DOWN, ".lora_B": UP},
    "<module>.lora_A, <module>.lora_B and biases, as loralib.lora_state_dict(model) gives, or the "
    "whole model.state_dict()",
)
WEIGHT, BIAS = ".weight", ".bias"
# loralib's convolutions hold torch's as a child of this name.
INNER = ".conv"


def read_loralib(path: Path, name: str, hints: Hints) -> Adapter:
    """Reads what ``loralib.lora_state_dict`` gave: every key is used, or refused by name.

    Linear, embedding and convolution layers. Fused layers (``MergedLinear``) become one pair that
    computes the same, with zeros where nothing is adapted; their scale is still alpha over the
    rank of one output.

    A whole ``state_dict()`` is read too, see `LoralibFile`.

    ``alpha`` is needed, but for a file that was written here; ``r`` is checked; ``enable_lora``
    says what is fused; the base says which layers can be, and is needed for convolutions, whose
    kernel nothing else tells but their weight in the file.
    """
    tensors, texts = read_file(path, hints.allow_pickle), metadata_of(path)
    base = layers_of(hints.base)
    with within(path):
        file = sort_loralib(tensors, base)
        alphas = _alphas(texts, hints, file.layers)
        hints = replace(hints, enable_lora=_fused(texts, hints, file.layers))
        layers = {m: _layer(m, file.weights.get(m), base.get(m)) for m in file.layers}
        tables = {module for module, own in base.items() if own.is_table}
        updates = {
            module: update_of(module, pair, layers[module], alphas[module], hints, module in tables)
            for module, pair in file.layers.items()
        }
    for module, weight in file.weights.items():
        layer = layers[module]
        if hints.base is not None and layer is not None:
            check_base(path, module, updates[module], weight, layer, base, hints.strict)
    return Adapter(name, updates, file.replacements)


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
    given = _said(texts, FUSED, "what is fused", hints.enable_lora)
    if isinstance(given, Mapping) and FUSED not in texts:
        check_all_used("enable_lora", given, paths)
    return given


def _said(texts: Mapping[str, str], key: str, what: str, given: object) -> Any:
    """What a file says under a key, else what a hint does; not both."""
    text = texts.get(key)
    if text is None:
        return given
    if given is not None:
        raise AdapterError(f"says {what}; leave the hint {'alpha' if key == ALPHAS else key} out")
    with within(key):
        return parse_object(text.encode())


def _alphas(texts: Mapping[str, str], hints: Hints, paths: Collection[str]) -> dict[str, float]:
    """The alpha of each layer, from the hint or the file: one for all, or by the end of a path."""
    given = _said(texts, ALPHAS, "what alpha is", hints.alpha)
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


@dataclass
class LoralibFile:
    """The tensors of a file by use.

    loralib freezes the weights that it adapts, so those of a whole state dict are the base's (in
    evaluation mode with the update merged into them) and tell shapes alone. Its other tensors may
    have been trained: they replace the base's, but where the base is given and has the same.

    Attributes:
        base: what is known of the model.
        layers: path of an adapted layer -> its pair.
        weights: path of an adapted layer -> its weight, of a whole state dict.
        replacements: parameter path -> tensor that takes its place.
    """

    base: BaseLayers
    layers: Layers = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    replacements: dict[str, torch.Tensor] = field(default_factory=dict)

    def claim(self, others: Tensors, layers: Layers) -> list[str]:
        """Files weights and replaced tensors; what is left has no use."""
        check_adapted(layers)
        named = {_outer(key, layers): tensor for key, tensor in others.items()}
        self.weights = {m: named[m + WEIGHT] for m in layers if m + WEIGHT in named}
        is_whole = self.weights.keys() == layers.keys()
        rest = {k: t for k, t in named.items() if k.removesuffix(WEIGHT) not in self.weights}
        self.replacements = {k: t for k, t in rest.items() if not (is_whole and self._has(k, t))}
        known = (BIAS, "") if is_whole else (BIAS,)
        unused = [k for k in rest if "lora_" in k.rpartition(".")[2] or not k.endswith(known)]
        return unused + ([] if is_whole else [module + WEIGHT for module in self.weights])

    def _has(self, key: str, tensor: torch.Tensor) -> bool:
        """Whether the base has this tensor, as far as the file's dtype tells."""
        own = self.base.parameter(key)
        return own is not None and torch.equal(own.to(tensor), tensor)


def sort_loralib(tensors: Tensors, base: BaseLayers) -> LoralibFile:
    """Sorts every tensor of a file to its use."""
    file = LoralibFile(base)
    file.layers = sort_keys(tensors, DIALECT, file.claim)
    return file


def _outer(key: str, layers: Mapping[str, object]) -> str:
    """The name of a convolution's parameter in the base."""
    owner, _, leaf = key.rpartition(".")
    module = owner.removesuffix(INNER)
    return f"{module}.{leaf}" if owner != module and module in layers else key


def check_base(
    path: Path,
    module: str,
    update: AnyUpdate,
    weight: torch.Tensor,
    layer: tuple[int, ...],
    base: BaseLayers,
    strict: bool,
) -> None:
    """Refuses, or with ``strict=False`` warns of, an adapted weight that is not the base's.

    It may be as it was, or with the update merged into it, as loralib does in evaluation mode, and
    either way round.
    """
    own = base.parameter(module + WEIGHT)
    if own is None:
        return
    wide = torch.promote_types(own.dtype, torch.float32)
    forms = [own.to(wide), own.to(wide).T] if own.ndim == 2 else [own.to(wide)]
    known = [f for whole in forms if whole.shape == layer for f in (whole, update.weight(whole))]
    turned = [t.T for t in known if t.ndim == 2]
    tolerance = 16 * max(torch.finfo(weight.dtype).eps, torch.finfo(own.dtype).eps)
    if any(t.shape == weight.shape and _near(weight, t, tolerance) for t in known + turned):
        return
    message = (
        f"{path}: {module}{WEIGHT} is neither the base's nor that with this update merged into it; "
        "give the base that the adapter was trained on"
    )
    doubt(message, ", or pass strict=False to leave the weight out", strict)


def _near(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    gap = torch.linalg.vector_norm(one.to(other.dtype) - other)
    return bool(gap <= tolerance * torch.linalg.vector_norm(other))
