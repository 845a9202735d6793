"""What an adapter puts into the slots of a model: factors, vectors, and whole tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Final, Protocol

import torch

from lora_fx.adapters.adapter import Adapter, AnyUpdate, Update
from lora_fx.adapters.other_updates import anew
from lora_fx.algebra.low_rank import (
    NotLowRankError,
    additive,
    blocks_beside,
    factors_beside,
    pairs_beside,
)
from lora_fx.algebra.matrix_expr import Leaf, constant
from lora_fx.choices import SlotForm
from lora_fx.errors import AdapterError, shorten, within
from lora_fx.export.slots.base_weights import BaseWeights
from lora_fx.export.slots.foreign import as_builder_calls, fitted_names, of_one_rank
from lora_fx.export.slots.manifest import Manifest
from lora_fx.export.slots.slot import INVOCATION, ExpertSlot, InvocationSlot, Slot, TensorSlot
from lora_fx.injection.bind import Binding, bind
from lora_fx.injection.branch_tensors import branch_tensors, canonical, check_finite, check_product
from lora_fx.injection.invocation_mask import IDS
from lora_fx.layers.base_layers import BaseLayers
from lora_fx.layers.layer import Layer

FACTORS: Final = "factors"
VECTORS: Final = "vectors"
WEIGHT: Final = "weight"
Values = dict[str, torch.Tensor]


class Holds(Protocol):
    """A base, asked for its tensors."""

    def holds(self, name: str, value: torch.Tensor) -> bool:
        """Whether a tensor is its own."""


def values_of_adapter(adapter: Adapter, manifest: Manifest, model: Path) -> Values:
    """What goes into each input, every scale folded in; factors left alone have no effect.

    Raises:
        AdapterError: the adapter does not fit, or changes what the model has no slot for.
    """
    base, adapter = BaseWeights(model), as_builder_calls(adapter, manifest, model)
    binding = check_slots_serve(adapter, manifest, model, base)
    with within(f"adapter {adapter.name!r} for {model}"):
        return of_one_rank(dict(_Filling(binding, manifest, base).values()), manifest)


def check_slots_serve(adapter: Adapter, manifest: Manifest, model: Path, base: Holds) -> Binding:
    """Finds the slot of everything that an adapter changes.

    Args:
        adapter: to put into slots.
        manifest: of the model.
        model: its file, for messages.
        base: that the adapter may repeat tensors of.

    Raises:
        AdapterError: names what has no slot.
    """
    with within(model):
        binding = bind(_layers(manifest), fitted_names(adapter, manifest))
    with within(f"adapter {adapter.name!r} for {model}"):
        places = _Places(binding, manifest)
        places.check_replaced(base)
        places.check_invocation()
        for path in binding.updates:
            with within(path):
                places.of(path)
    return binding


def _layers(manifest: Manifest) -> BaseLayers:
    """What the slots are of: layers, and parameters."""
    factors = {slot.path: slot.layer for slot in manifest.slots if isinstance(slot, Slot)}
    tensors = [slot for slot in manifest.slots if isinstance(slot, TensorSlot | ExpertSlot)]
    whole = {layer.path: layer for t in tensors if isinstance(t, TensorSlot) if (layer := t.layer)}
    held = {t.path: torch.empty(t.shape, device="meta") for t in tensors}
    return BaseLayers({**whole, **factors}, held=held)


def form_of(update: AnyUpdate, layer: Layer | None) -> SlotForm | None:
    """Which slot serves an update: factors, with vectors or without; None: a whole tensor alone.

    Args:
        update: as `given_as` says.
        layer: that it is of, or None for a parameter that no layer alone reads.
    """
    update = anew(update) if layer is None else update
    if not update.makes_anew:
        is_product = isinstance(update, Update) and update.is_product
        return FACTORS if is_product and update.bias is None else VECTORS
    try:
        if layer is None:
            base = constant(torch.empty([size or 0 for size in update.shape], device="meta"))
            up, _ = blocks_beside(base, update.of(base))
            return FACTORS if up.ndim == len(update.shape) else None
        if layer.groups > 1:
            return None
        base = _base(layer, torch.Tensor)
        pairs_beside(base, additive(base, update.of(base)))
    except NotLowRankError:
        return None
    return FACTORS if update.bias is None else VECTORS


def given_as(binding: Binding, path: str) -> AnyUpdate:
    """An update with the factors that it was given with, where a grouped layer has no use."""
    update = binding.updates[path]
    meant = next((given for given, paths in binding.meant.items() if path in paths), path)
    own = binding.adapter.updates[meant]
    return own if update.makes_anew and isinstance(own, Update) else update


@dataclass(frozen=True)
class _Places:
    """An adapter, and the slots of a model."""

    binding: Binding
    manifest: Manifest

    @cached_property
    def tensors(self) -> Mapping[str, TensorSlot]:
        """The slots of whole tensors, by their names."""
        return {slot.path: slot for slot in self.manifest.slots if isinstance(slot, TensorSlot)}

    @cached_property
    def _others(self) -> Mapping[str, Slot | ExpertSlot]:
        found = (slot for slot in self.manifest.slots if isinstance(slot, Slot | ExpertSlot))
        return {slot.path: slot for slot in found}

    def check_replaced(self, base: Holds) -> None:
        """What has no slot may be the base's own, or change nothing.

        PEFT stores an adapted table's weight too, and what it adapts of layers that are not called.
        """
        replaced, updates = self.binding.adapter.replacements, self.binding.adapter.updates
        idle = [n for n in self.binding.refused if n in updates and not updates[n].has_effect()]
        open_ = [
            *(n for n in self.binding.refused if n not in idle or not self.binding.updates),
            *(n for n in self.binding.replaced if n not in self.tensors),
        ]
        if left := [n for n in open_ if n not in replaced or not base.holds(n, replaced[n])]:
            slots = shorten([slot.path for slot in self.manifest.slots])
            raise AdapterError(
                f"no slot at {shorten(left)}; the model has slots at {slots}; export the model "
                "with slots= for these, or fold the adapter into a model of its own"
            )

    @cached_property
    def invocation(self) -> InvocationSlot | None:
        """The slot of the tokens from which on factors act, if there is one."""
        return next((s for s in self.manifest.slots if isinstance(s, InvocationSlot)), None)

    @property
    def tokens(self) -> tuple[int, ...]:
        """From which on the adapter acts."""
        return next((u.invocation for u in self.binding.updates.values()), ())

    def check_invocation(self) -> None:
        """Refuses an activated adapter where nothing would tell it when to act."""
        apart = sorted({update.invocation for update in self.binding.updates.values()})
        if len(apart) > 1:
            raise AdapterError(
                f"its updates act from the tokens {apart[0]} on, and from {apart[1]}: one file "
                "has one invocation; make two adapters of it"
            )
        if any(apart) and self.invocation is None:
            raise AdapterError(
                f"it acts from its invocation tokens {list(self.tokens)} on (aLoRA), and the model "
                f'has no slot for these; export it with slots={{..., "{IDS}": "{INVOCATION}"}}'
            )

    def of(self, path: str) -> Slot | ExpertSlot | TensorSlot:
        """The slot that an update goes to: of factors if it has such, else the whole weight's.

        Raises:
            AdapterError: there is none, or it takes no vectors.
        """
        update, slot = given_as(self.binding, path), self._others.get(path)
        layer = slot.layer if isinstance(slot, Slot) else None
        form = None if slot is None else form_of(update, layer)
        whole = (t for name, t in self.tensors.items() if path in (name, t.layer_path))
        tensor = next(whole, None)
        if slot is not None and form is not None:
            if isinstance(slot, Slot) and form == VECTORS and not slot.vectors:
                raise _no_vectors(update)
            return slot
        if tensor is not None:
            return tensor
        raise AdapterError(
            f"an update of kind {update.kind!r} makes the weight anew, which no factors can say; "
            f'export the model with a slot for the whole weight, slots={{"{path}": "weight"}}, or '
            "fold the adapter into a model of its own"
        )


@dataclass(frozen=True)
class _Filling(_Places):
    """The values that an adapter puts into the slots of a model file."""

    base: BaseWeights

    def values(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The values by the names of the inputs."""
        filled: Values = {}
        for path in self.binding.updates:
            with within(path):
                filled |= self._updated(path)
        for name, value in self.binding.replaced.items():
            if name in self.tensors:
                filled.setdefault(name, _held(name, value, self.tensors[name].torch_dtype))
        if self.invocation is not None:
            filled |= dict.fromkeys(self.invocation.names, torch.tensor(self.tokens).long())
        for slot in self.manifest.slots:
            yield from {n: filled.get(n, t) for n, t in slot.neutral().items()}.items()
        yield from ((name, value) for name, value in filled.items() if name in self.tensors)

    def _updated(self, path: str) -> Values:
        """What one update puts into the slots of its layer, or of its parameter."""
        slot = self.of(path)
        if isinstance(slot, ExpertSlot):
            return _of_experts(slot, self.binding.updates[path])
        if isinstance(slot, TensorSlot):
            return self._merged(slot, self.binding.updates[path])
        return self._beside(slot, given_as(self.binding, path))

    def _beside(self, slot: Slot, update: AnyUpdate) -> Values:
        """Factors and vectors beside the layer."""
        weight, bias = partial(self._weight, slot), partial(self.base.bias, slot)
        if slot.groups > 1 and isinstance(update, Update):
            update = _ungrouped(update, slot.layer)
        if update.makes_anew:
            update = _low_rank(update, slot.layer, weight())
        terms = branch_tensors(update, slot.layer, weight, bias)
        check_finite(slot.layer, self.binding.adapter.name, update, terms, weight)
        check_product(slot.layer, self.binding.adapter.name, terms)
        return {
            slot.inputs[part].name: slot.as_input(part, value)
            for part, value in terms.each().items()
        }

    def _weight(self, slot: Slot) -> torch.Tensor:
        """Of a slot's layer: the base's, or what the adapter brings in its place."""
        replaced = (n for n in self.binding.replaced if self._is_of(n, slot.path))
        name = next(replaced, None)
        return self.base.weight(slot) if name is None else self.binding.replaced[name]

    def _is_of(self, name: str, path: str) -> bool:
        return name in self.tensors and self.tensors[name].layer_path == path

    def _merged(self, slot: TensorSlot, update: AnyUpdate) -> Values:
        """W', and b' if the update changes it."""
        weight, layer = self._own(slot), slot.layer
        if layer is None:
            return {slot.path: _held(slot.path, update.weight(weight), slot.torch_dtype)}
        made = layer.type.store("weight", update.weight(canonical(layer, weight)), layer.groups)
        found = {slot.path: _held(slot.path, made, slot.torch_dtype)}
        name = f"{slot.path.removesuffix('weight')}bias"
        beside = self.tensors.get(name) if slot.path.endswith("weight") else None
        own = None if beside is None else self._own(beside)
        shift = update.shift(lambda: own)
        if shift is None:
            return found
        if beside is None or own is None:
            raise AdapterError(
                f"an update of kind {update.kind!r} changes the bias, which has no slot; export "
                f'the model with slots={{"{name}": "weight"}} too'
            )
        return {**found, name: _held(name, own + shift, beside.torch_dtype)}

    def _own(self, slot: TensorSlot) -> torch.Tensor:
        replaced = self.binding.replaced.get(slot.path)
        return (
            self.base.tensor(slot.path, slot.shape, slot.digest) if replaced is None else replaced
        )


def _of_experts(slot: ExpertSlot, update: AnyUpdate) -> Values:
    base = constant(torch.empty(slot.shape, device="meta"))
    up, down = blocks_beside(base, update.of(base))
    parts = {"down": down, "up": up}
    return {slot.inputs[p].name: _held(p, v, slot.torch_dtype) for p, v in parts.items()}


def _held(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    kept = value.detach().to(dtype).contiguous()
    if not kept.isfinite().all():
        raise AdapterError(f"{name}: NaN or infinity in {dtype}; save the adapter again")
    return kept


def _no_vectors(update: AnyUpdate) -> AdapterError:
    what = update.kind if update.bias is None else "lora_bias"
    return AdapterError(
        f"{what} needs a vector beside the factors, and the slot takes none; export the "
        "model with vectors=True, or fold the adapter into a model of its own"
    )


def _low_rank(update: AnyUpdate, layer: Layer, weight: torch.Tensor) -> Update:
    """An update that is an expression in W as factors."""
    base = _base(layer, lambda: canonical(layer, weight))
    down, up = factors_beside(base, additive(base, update.of(base)))
    return Update(down.reshape(-1, *layer.own_shape[1:]), up, 1.0, update.kind, update.bias)


def _base(layer: Layer, fetch: Callable[[], torch.Tensor]) -> Leaf:
    out, *rest = layer.own_shape
    return Leaf((out, math.prod(rest)), "base", fetch)


def _ungrouped(update: Update, layer: Layer) -> Update:
    """An update of a grouped convolution by factors that read all inputs and give all outputs."""
    groups, (_, into, *kernel) = layer.groups, layer.own_shape
    if update.shape == layer.shape:
        return replace(update, up=_diagonal(update.up, update.groups))
    down = update.down.reshape(-1, into, *kernel)
    wide = down.new_zeros(groups, len(down), groups, into, *kernel)
    for group in range(groups):
        wide[group, :, group] = down
    return replace(update, down=wide.reshape(-1, *layer.shape[1:]), up=_diagonal(update.up, groups))


def _diagonal(up: torch.Tensor, groups: int) -> torch.Tensor:
    """(out, r), whose rows come group by group, as (out, groups * r)."""
    whole: torch.Tensor = torch.block_diag(*up.chunk(groups))  # type: ignore[no-untyped-call]
    return whole
