"""Layers of an nn.Module by path and class, without a graph: where an update acts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.adapters.source_record import is_embedding
from lora_fx.graph.traced_module import TracedModule
from lora_fx.layers.layer import Layer, layer_of
from lora_fx.layers.layer_types import TYPES


class NoWeightFormError(Exception):
    """The tree does not say which weight an update means; the text says why."""


@dataclass(frozen=True, eq=False)
class Place:
    """One parameter of one module.

    Attributes:
        module: the object itself, whatever its names.
        leaf: name of the parameter.
        layer: what reads it, or None: it is taken as it is stored.
        inside: the module was named, and not its parameter: what others read of it is not meant,
            if it is called as well.
    """

    module: nn.Module
    leaf: str
    layer: Layer | None
    inside: bool

    @property
    def bias(self) -> str | None:
        """Name of the bias beside it, whether or not there is one."""
        return self.leaf.replace("weight", "bias") if self.leaf.endswith("weight") else None


def place_of(traced: TracedModule, path: str, update: AnyUpdate, hint: Layer | None) -> Place:
    """The place that a path means.

    Args:
        traced: the tree.
        path: of a module, or of a parameter.
        update: tells by its shape which way round a hand-written layer stores its weight.
        hint: how the layer was called; asked where the weight is square and no class tells.

    Raises:
        NoWeightFormError: nothing is there, or more than one thing.
    """
    module = traced.modules.get(path)
    if module is not None:
        leaf = _leaf(traced, path, module, update)
        return Place(module, leaf, _layer(traced, path, module, leaf, update, hint), inside=True)
    owner, _, leaf = path.rpartition(".")
    module = traced.modules.get(owner)
    if module is None or traced.parameters(module).get(leaf) is None:
        raise NoWeightFormError(f"the model has no module or parameter {path}")
    return Place(module, leaf, _layer(traced, path, module, leaf, update, hint), inside=False)


def _leaf(traced: TracedModule, path: str, module: nn.Module, update: AnyUpdate) -> str:
    """The parameter that is meant by its module's name."""
    held = traced.parameters(module)
    matrices = [name for name, p in held.items() if p is not None and len(p.shape) > 1]
    for usual in ("weight", "in_proj_weight"):
        if usual in matrices:
            return usual
    if len(matrices) > 1:
        sizes = sorted(size or 0 for size in update.shape)
        matrices = [name for name in matrices if sorted(held[name].shape) == sizes]
    if len(matrices) != 1:
        raise NoWeightFormError(f"which parameter of {path} is meant is not told by its class")
    return matrices[0]


def _layer(
    traced: TracedModule,
    path: str,
    module: nn.Module,
    leaf: str,
    update: AnyUpdate,
    hint: Layer | None,
) -> Layer | None:
    held = traced.parameters(module)[leaf]
    known = layer_of(module, path) if leaf == "weight" else None
    if known is not None and known.is_matrix:
        return replace(known, dtype=held.dtype)
    stored = tuple(held.shape)
    turned = len(stored) == 2 and not _fits(update.shape, stored)
    if hint is not None and (len(stored) > 2 or stored[0] == stored[1]):
        turned = hint.transposed
    if update.makes_anew and not turned:
        return None
    layer = Layer(path=path, kind="linear", shape=stored, dtype=held.dtype)
    if len(stored) > 2:
        return _with_kernel(layer, hint)
    if not turned:
        return layer
    kind = "embedding" if is_embedding(update.stored) else "linear_transposed"
    return replace(layer, kind=kind, shape=stored[::-1])


def _with_kernel(layer: Layer, hint: Layer | None) -> Layer:
    """A hand-written convolution, which how it was called tells from a transposed one."""
    kind = f"conv{len(layer.shape) - 2}d"
    if hint is not None and hint.transposed and hint.groups == 1:
        kind = hint.kind
    if kind not in TYPES:
        raise NoWeightFormError(f"{layer.path} has {len(layer.shape)} axes, as no layer has")
    return replace(layer, kind=kind, shape=TYPES[kind].canonical_shape(layer.shape))


def _fits(found: tuple[int | None, ...], wanted: tuple[int, ...]) -> bool:
    pairs = zip(found, wanted, strict=False)
    return len(found) == len(wanted) and all(size in (None, axis) for size, axis in pairs)


def replaced(traced: TracedModule, name: str) -> tuple[nn.Module, str, Mapping[str, Any]]:
    """The module that holds a parameter or buffer of a name, its own name, and what it is among.

    Raises:
        NoWeightFormError: the tree holds none of this name.
    """
    owner, _, leaf = name.rpartition(".")
    module = traced.modules.get(owner)
    if module is not None:
        for store in (traced.parameters(module), traced.buffers(module)):
            if store.get(leaf) is not None:
                return module, leaf, store
    raise NoWeightFormError(f"the model has no parameter {name}")
