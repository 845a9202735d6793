"""loralib's state dicts: ``<module>.lora_A`` beside ``<module>.lora_B``, and no scale."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.adapters.scaling import alpha_for, checked_alpha, checked_rank
from lora_fx.adapters.updates import Update
from lora_fx.errors import AdapterError, doubt, shorten, within
from lora_fx.formats import dialects
from lora_fx.formats.dialects import Contents, Dialect, Layers, Roles, Tensors
from lora_fx.formats.hints import Hints, check_all_used, value_for
from lora_fx.io.state_dict import metadata_of, read_file
from lora_fx.io.strict_json import parse_object
from lora_fx.kinds import lora, loralib
from lora_fx.kinds.lora import DOWN, UP
from lora_fx.kinds.loralib import Groups, Sizes, checked_groups
from lora_fx.kinds.validation import measure
from lora_fx.layers.base_layers import BaseLayers
from lora_fx.layers.layer import Layer

Shape = tuple[int, ...]  # (out, in / groups, *kernel)
# Keys of the safetensors metadata, ours: loralib keeps both in the model's constructor.
ALPHAS, FUSED = "lora_alpha", "enable_lora"
PICKLES = (".pt", ".pth", ".bin")
DIALECT = Dialect(
    {".lora_A": DOWN, ".lora_B": UP},
    "<module>.lora_A, <module>.lora_B and biases, as loralib.lora_state_dict(model) gives, or the "
    "whole model.state_dict()",
    # Of OpenDelta, of the library adapters, of minLoRA.
    silent=r"(lora|loras\.\w+|parametrizations\.weight\.0)(?=\.lora_[AB]$)",
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
    base = hints.layers
    with within(path):
        file = LoralibFile(base)
        file.layers = dialects.sort_keys(tensors, DIALECT, file.claim)
        alphas = _alphas(texts, hints, file.layers)
        hints = replace(hints, enable_lora=_fused(texts, hints, file.layers))
        layers = {m: _layer(m, file.weights.get(m), base.get(m)) for m in file.layers}
        tables = {module for module, own in base.items() if own.is_table}
        updates = {
            m: update_of(m, roles, layers[m], alphas[m], hints, m in tables)
            for m, roles in file.layers.items()
        }
        for module, weight in file.weights.items():
            own, layer = base.parameter(module + WEIGHT), layers[module]
            if own is None or layer is None or _is_of(own, weight, updates[module], layer):
                continue
            message = (
                f"{module}{WEIGHT} is neither the base's nor that with this update merged into it; "
                "give the base that the adapter was trained on"
            )
            doubt(path, message, ", or pass strict=False to leave the weight out", hints.strict)
    return Adapter(name, updates, file.replacements)


def _layer(module: str, weight: torch.Tensor | None, base: Layer | None) -> Shape | None:
    """The shape of a layer, from the base or from the file; None if unknown."""
    if base is not None and not (base.is_matrix and base.in_files):
        raise AdapterError(
            f"{module} is of a {base.name}; linear, embedding and convolution layers are supported"
        )
    if base is not None or weight is None:
        return None if base is None else base.own_shape
    # Of a matrix the pair tells more: an embedding's and some linear layers' are turned.
    return tuple(weight.shape) if weight.ndim > 2 else None


def _fused(texts: Mapping[str, str], hints: Hints, paths: Iterable[str]) -> Any:
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
        dialects.check_adapted(layers)
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


def _outer(key: str, layers: Mapping[str, object]) -> str:
    """The name of a convolution's parameter in the base."""
    owner, _, leaf = key.rpartition(".")
    module = owner.removesuffix(INNER)
    return f"{module}.{leaf}" if owner != module and module in layers else key


def _is_of(own: torch.Tensor, weight: torch.Tensor, update: AnyUpdate, layer: Shape) -> bool:
    """Whether an adapted weight is the base's own, or that with the update merged into it.

    The latter is what loralib does in evaluation mode; both may be either way round.
    """
    wide = torch.promote_types(own.dtype, torch.float32)
    forms = [own.to(wide), own.to(wide).T] if own.ndim == 2 else [own.to(wide)]
    known = [f for whole in forms if whole.shape == layer for f in (whole, update.weight(whole))]
    turned = [t.T for t in known if t.ndim == 2]
    tolerance = 16 * max(torch.finfo(weight.dtype).eps, torch.finfo(own.dtype).eps)
    fitting = [t for t in known + turned if t.shape == weight.shape]
    return any((weight.to(t.dtype) - t).norm() <= tolerance * t.norm() for t in fitting)


def update_of(
    path: str, roles: Roles, layer: Shape | None, alpha: float, hints: Hints, is_table: bool
) -> AnyUpdate:
    """The update of one layer: ``W + alpha / r * (lora_B @ lora_A)``, viewed as W is.

    Of a layer that is not known to be one, a pair is of no convolution, nor of an embedding.
    """
    lora.check_pair(roles)
    (first, down), (second, up) = roles[DOWN], roles[UP]
    measure(dict(roles.values()), {first: ("r * adapted", "in"), second: ("out", "r")})
    kernel = () if layer is None else layer[2:]
    size = kernel[0] if kernel else 1
    rank, rest = divmod(up.shape[1], size)
    with within(f"{path}: lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)}"):
        if rest or not rank:
            raise AdapterError(f"the layer's kernel is {kernel}, expected r * {size} ranks")
        if hints.r is not None and checked_rank("r", hints.r) != rank:
            raise AdapterError(
                f"of rank {rank}, the hint r is {hints.r}; a convolution's matrices have "
                "r times its kernel's size: pass base= if it is one"
            )
        settings = {"alpha": alpha, "r": rank, "scale": alpha / rank}
        if layer is not None and kernel:
            return loralib.convolution(down, up, layer, settings)
        groups, sizes = groups_of(path, down, up, hints, None if layer is None else layer[0])
        if groups is not None:
            return loralib.fused(down, up, groups, settings, sizes)
    return lora.read(roles, lora.Form(), alpha=alpha, is_table=is_table)


def groups_of(
    path: str, down: torch.Tensor, up: torch.Tensor, hints: Hints, out: int | None
) -> tuple[Groups | None, Sizes | None]:
    """Which outputs of a layer are adapted, None of one output; their rows, where they differ.

    Of several, down is (r * adapted, in) and up (size * adapted, r); ``out`` is how many rows the
    base's layer has, if that is known.
    """
    count, rest = divmod(len(down), up.shape[1])
    sizes = loralib.sizes_of(path, down, up, hints.base)
    if rest or not count or (sizes is None and len(up) % count):
        raise AdapterError("the ranks differ, expected (r, in) and (out, r)")
    groups = _hinted(path, hints, count, len(up), out)
    if groups is None and count > 1:
        raise AdapterError(
            f"a fused layer (MergedLinear) with {count} adapted outputs; pass "
            "enable_lora=, such as [True, False, True], as its model has it"
        )
    if groups is not None and sum(groups) != count:
        raise AdapterError(
            f"{count} outputs are adapted, enable_lora={list(groups)} says {sum(groups)}"
        )
    size = sum(sizes or ()) or len(up) // count * len(groups or (True,))
    if out is not None and out != size:
        said = "no enable_lora" if groups is None else f"enable_lora={list(groups)}"
        raise AdapterError(
            f"with {said} of an output of {size}, the base's is of {out}; "
            "pass enable_lora= as its model has it"
        )
    return groups, sizes


def _hinted(path: str, hints: Hints, count: int, rows: int, out: int | None) -> Groups | None:
    """What the hint says of a layer; a hint for all layers is of those that can be fused."""
    given = hints.enable_lora
    if given is None:
        return None
    if isinstance(given, Mapping):
        found = value_for(given, path)
        return None if found is None else checked_groups(found)
    groups = checked_groups(given)
    if count > 1:
        return groups
    if sum(groups) > 1 or groups == (True,):
        return None
    if out is None:
        raise AdapterError(
            f"enable_lora={list(groups)} adapts one output, so {path} may be fused or not; pass "
            "base=, or enable_lora={name: [...]} for the layers that are"
        )
    return groups if out != rows else None


def contents(adapter: Adapter, path: Path, hints: Hints) -> Contents:
    """A state dict that a model of loralib's layers loads, and texts beside.

    Tensors that loralib wrote are written as they were; another product of two factors becomes
    that of its ``Linear``, ``Embedding`` or ``Conv2d`` layer. A ``.pt`` holds the tensors alone,
    so all layers must have one alpha, which the reader has to know, as it has to know what is
    fused; a ``.safetensors`` holds both in its metadata. rsLoRA becomes the alpha that gives its
    scale over the rank.
    """
    others = [key for key in adapter.replacements if not key.endswith(".bias")]
    dialects.check_held(adapter, "loralib's format", others, _problem)
    alphas = {module: _alpha(update) for module, update in adapter.updates.items()}
    if path.suffix in PICKLES and len(set(alphas.values())) > 1:
        found = shorten([f"{p}: {alpha:g}" for p, alpha in alphas.items()])
        raise AdapterError(f"its layers have several alphas ({found}): write .safetensors")
    tensors, fused = dict(adapter.replacements), {}
    for module, update in adapter.updates.items():
        own = update.stored_tensors if _is_own(update) else _pair(update)
        tensors |= {f"{module}.{leaf}": tensor for leaf, tensor in own.items()}
        if _is_own(update) and FUSED in update.stored_settings:
            fused[module] = update.stored_settings[FUSED]
    said = {ALPHAS: alphas, FUSED: fused}
    return tensors, {key: json.dumps(value) for key, value in said.items() if value}


def _problem(update: AnyUpdate) -> str | None:
    if _is_own(update):
        return None
    found = dialects.not_lora(update, {dialects.EMBEDDINGS})
    if found is not None or not isinstance(update, Update):
        return found
    kernel = update.down.shape[2:]
    is_square = len(kernel) == 2 and len(set(kernel)) == 1
    is_held = is_square or all(size == 1 for size in kernel)
    return None if is_held else f"updates of kernels such as {tuple(kernel)}"


def _is_own(update: AnyUpdate) -> bool:
    return update.stored_tensors.keys() == loralib.LEAVES


def _alpha(update: AnyUpdate) -> float:
    settings = update.stored_settings if _is_own(update) else {}
    if isinstance(update, Update) and settings.get("scale") != update.scale:
        return alpha_for(update.scale, settings.get("r", update.rank))
    return float(settings["alpha"])


def _pair(update: AnyUpdate) -> Tensors:
    """lora_A and lora_B of a product of two factors."""
    assert isinstance(update, Update)
    size = update.down.shape[2] if update.down.ndim > 2 else 1
    down = update.down.reshape(update.rank * size, -1)
    return loralib.pair(down, loralib.as_points(update.up, size) if size > 1 else update.up)
