"""Binds an adapter to layers: which update goes to which of them, or why it does not fit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from lora_fx.adapters.adapter import Adapter, AnyUpdate, Update
from lora_fx.adapters.parameter_updates import name_of
from lora_fx.adapters.safe_regex import SlowRegexError
from lora_fx.adapters.settle import settled
from lora_fx.adapters.target_rule import TargetRule
from lora_fx.errors import AdapterError, AdapterWarning, advised, shorten, within
from lora_fx.graph.lazy_tensor import LazyTensor
from lora_fx.injection.conform import conform, conform_parameter, fits, remedy
from lora_fx.layers.base_layers import BaseLayers
from lora_fx.layers.moves import MOVED
from lora_fx.numerics import equal_numbers


@dataclass(frozen=True, eq=False)
class Binding:
    """An adapter and the layers that it means.

    Attributes:
        adapter: as it was given, or by the paths of the base where its own are found in it alone.
        meant: path that the adapter has -> paths that the base has for it; none for a table that
            is never called itself, whose rows those who share it have.
        updates: by the base's path, each in the shape of its layer.
        replaced: tensors that take the place of the base's, by the base's names.
        refused: path or name that the base has nothing for -> the reason.
    """

    adapter: Adapter
    meant: Mapping[str, Sequence[str]]
    updates: Mapping[str, AnyUpdate]
    replaced: Mapping[str, torch.Tensor]
    refused: Mapping[str, str]

    def renamed(self) -> Adapter:
        """The adapter by the paths of the base."""
        return replace(self.adapter, updates=self.updates, replacements=self.replaced)


@advised("use the base that it was trained on, or leave it out of the adapter")
def bind(layers: BaseLayers, adapter: Adapter) -> Binding:
    """Finds what each update and each replaced tensor of an adapter means in a base.

    A module that has several names is called by some of them in a graph, and a file may name a
    parameter where the graph has the layer that reads it.

    Args:
        layers: of the base.
        adapter: to bind.

    Raises:
        AdapterError: an update is made for a layer of another shape; two paths mean one layer,
            with values that differ; or rows are trained of a table that another layer shares,
            which the file leaves open.
    """
    adapter = _settled(layers, adapter)
    found: dict[str, list[str]] = {}
    updates: dict[str, AnyUpdate] = {}
    refused: dict[str, str] = {}
    for given, update in adapter.updates.items():
        meant = _meant(layers, given, update)
        if not meant and not _is_shared(given, adapter, layers):
            refused[given] = "no layer of the graph has this path"
            continue
        for path in meant:
            known = next((other for other, paths in found.items() if path in paths), given)
            if not _are_same(update, adapter.updates[known]):
                raise AdapterError(
                    f"adapter {adapter.name}: {known} and {given} are one layer of the model "
                    f"({path}), and the two updates differ: leave out the one that is not meant"
                )
            with within(f"adapter {adapter.name}, {path}"):
                updates[path] = _in_shape(layers, path, update)
        found[given] = meant
    _check_shared_tokens(adapter.name, updates, layers)
    replaced = _replaced(layers, adapter, refused)
    return Binding(adapter, found, updates, replaced, refused)


def _settled(layers: BaseLayers, adapter: Adapter) -> Adapter:
    """An adapter that was held against no base yet, by the paths of this one.

    What is bound may be a part of a model, which has another part's layers: no path is renamed.
    """
    if adapter.moved is not None:
        return adapter
    known = [p for p, update in adapter.updates.items() if _meant(layers, p, update)]
    known += [path for path in adapter.updates if _is_shared(path, adapter, layers)]
    known += [n for n in adapter.replacements if any(_called(layers, n))]
    return settled(adapter, layers, known, furthest=MOVED)


def targeted(rule: TargetRule | None, layers: BaseLayers) -> list[str] | None:
    """The layers that a file says it adapts; None if it does not say, or not at once.

    It has tensors too, which say the same: a regex that cannot be run costs a check, no more.
    """
    try:
        return None if rule is None else meant_by(rule, layers)
    except SlowRegexError as error:
        warnings.warn(
            f"{error}. Whether the adapter lacks layers that it targets was not checked",
            AdapterWarning,
            stacklevel=4,
        )
        return None


def meant_by(rule: TargetRule, layers: BaseLayers) -> list[str]:
    """The layers that a rule means.

    Raises:
        SlowRegexError: a regex of the rule is not done in time.
    """
    return [path for path in layers if _targets(rule, path, layers)]


def _targets(rule: TargetRule, path: str, layers: BaseLayers) -> bool:
    """Whether a rule means a layer; "all-linear" leaves out heads and what is no linear module."""
    if rule.is_all_linear and (path == layers.head or not _is_linear_module(layers, path)):
        return False
    return rule.matches(path)


def _is_linear_module(layers: BaseLayers, path: str) -> bool:
    return layers[path].is_linear and not layers.is_bare(path) and not layers.is_packed(path)


def _meant(layers: BaseLayers, path: str, update: AnyUpdate) -> list[str]:
    """What a path is called in the base: nothing, where the base has nothing for it."""
    named = [name for name in (path, *layers.aliases.get(path, ())) if name in layers]
    return named or _stored_at(layers, path, update) or _parameter(layers, path, update)


def _stored_at(layers: BaseLayers, path: str, update: AnyUpdate) -> list[str]:
    """The layers whose weight is stored under a path, or below it, and that the update fits."""
    found = [p for p, name in layers.weights.items() if name in (path, f"{path}.weight")]
    own = [p for p in layers if layers.is_bare(p) and p.rpartition(".")[0] == path]
    if not found and len(own) == 1:  # a module that holds one matrix, whatever it calls it
        found = own
    fitting = [p for p in found if fits(update, layers[p])]
    return fitting if len({layers[p].kind for p in fitting}) == 1 else []


def _parameter(layers: BaseLayers, path: str, update: AnyUpdate) -> list[str]:
    """A parameter that no layer alone reads: one that holds experts, or is computed with."""
    is_known = update.makes_anew or isinstance(update, Update)
    is_of_module = update.makes_anew or name_of(update) == "weight"
    names = [path, f"{path}.weight"][: 2 if is_of_module else 1] if is_known else []
    return next(([name] for name in names if layers.unevaluated(name) is not None), [])


def _in_shape(layers: BaseLayers, path: str, update: AnyUpdate) -> AnyUpdate:
    if (layer := layers.get(path)) is not None:
        return conform(update, layer)
    return conform_parameter(update, tuple(getattr(layers.unevaluated(path), "shape", ())))


def _is_shared(path: str, adapter: Adapter, layers: BaseLayers) -> bool:
    """Whether rows are of a table that is never called itself: those who share it have them."""
    tokens = {p: u for p, u in adapter.updates.items() if u.kind == "tokens"}
    tables = {u.stored.settings.get("tied") for p, u in tokens.items() if p in layers and u.stored}
    return path in tokens and path in tables


def _are_same(one: AnyUpdate, other: AnyUpdate) -> bool:
    """Whether two updates, of two names of one module, hold the same numbers."""
    if one is other:
        return True
    pairs = zip(one.tensors(), other.tensors(), strict=False)
    scales = (getattr(one, "scale", None), getattr(other, "scale", None))
    counts = len(list(one.tensors())), len(list(other.tensors()))
    same = one.kind == other.kind and counts[0] == counts[1] and scales[0] == scales[1]
    return same and all(equal_numbers(a, b) for a, b in pairs)


def _check_shared_tokens(name: str, updates: Mapping[str, AnyUpdate], layers: BaseLayers) -> None:
    """Refuses rows of a shared table that are not said of all who share it.

    PEFT stores them once, and gives a tied head the same rows without a word in the file; those of
    a head that is named itself are the head's alone.
    """
    tokens = {p: u for p, u in updates.items() if u.kind == "tokens" and p in layers.weights}
    tables = {p for p, u in tokens.items() if not (u.stored and u.stored.settings.get("head"))}
    weights = {layers.weights[path] for path in tables}
    sharing = [p for p, weight in layers.weights.items() if weight in weights and p not in updates]
    if sharing:
        raise AdapterError(
            f"adapter {name}: trained tokens of {shorten(sorted(tables))}, whose table "
            f"{shorten(sharing)} shares: the file does not say whether the rows are meant there "
            "too; load it with base=, the model"
        )


def _called(layers: BaseLayers, name: str) -> Iterator[tuple[str, torch.Tensor | LazyTensor]]:
    """A parameter under each name that the base has for it."""
    module, dot, leaf = name.rpartition(".")
    for called in (name, *(f"{path}{dot}{leaf}" for path in layers.aliases.get(module, ()))):
        own = layers.unevaluated(called)
        if own is not None:
            yield called, own


def _replaced(
    layers: BaseLayers, adapter: Adapter, refused: dict[str, str]
) -> dict[str, torch.Tensor]:
    """The replaced tensors by the names that the base has for them."""
    found: dict[str, torch.Tensor] = {}
    given: dict[str, str] = {}
    for name, value in adapter.replacements.items():
        called = dict(_called(layers, name))
        if not called and value.is_floating_point():  # a count of batches changes no output
            refused[name] = "no layer of the graph reads a parameter of this name"
        for known, own in called.items():
            if own.shape != value.shape:
                raise AdapterError(
                    f"adapter {adapter.name}, {known}: shape {tuple(value.shape)}, the model's is "
                    f"{tuple(own.shape)}. {remedy(tuple(value.shape), tuple(own.shape))}"
                )
            if known in given and not equal_numbers(value, found[known]):
                raise AdapterError(
                    f"adapter {adapter.name}: {given[known]} and {name} are one parameter of the "
                    "model, and the two values differ: leave out the one that is not meant"
                )
            given[known], found[known] = name, value
    return found
