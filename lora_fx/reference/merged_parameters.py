"""Parameters that read as W', the merged weight, while their module runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lora_fx.adapters.adapter import AnyUpdate
from lora_fx.errors import within
from lora_fx.graph.lazy_tensor import LazyTensor, evaluate
from lora_fx.injection.conform import conform
from lora_fx.injection.injected_adapters import Injected, value_part
from lora_fx.layers.layer import Layer
from lora_fx.numerics import widened
from lora_fx.reference.module_layers import NoWeightFormError, Place


@dataclass(frozen=True, eq=False)
class Step:
    """One update of one weight.

    Attributes:
        owner: the adapter that it is of.
        path: as the adapter has it.
        update: as the adapter has it.
        place: where it acts.
        summed: whether it is added to what the others make of the same base; otherwise their
            result is its base, because they were folded before.
    """

    owner: Injected
    path: str
    update: AnyUpdate
    place: Place
    summed: bool

    def weight(self, stored: torch.Tensor) -> torch.Tensor:
        """W' of W, both as the module stores them."""
        layer = self.place.layer
        if layer is None:
            return self.update.weight(stored)
        with within(self.path):
            update = conform(self.update, layer)
        groups = 1 if self.is_whole else layer.groups
        own = layer.type.canonical("weight", stored, groups)
        return layer.type.store("weight", update.weight(own), groups)

    def bias(self, own: torch.Tensor) -> torch.Tensor:
        """B' of b."""
        shift = self.update.shift(lambda: own)
        return own if shift is None else own + shift

    @property
    def changes_bias(self) -> bool:
        """Whether B' is another than b."""
        return self.update.shift(lambda: torch.ones(1)) is not None

    @property
    def makes_anew(self) -> bool:
        """Whether the graph makes the weight anew: of its kind, or where nothing stands beside."""
        bounds = self.owner.bound.get(self.path, ())
        return self.update.makes_anew or any(value_part(0) in bound.names for bound in bounds)

    @property
    def is_whole(self) -> bool:
        """Whether it mixes the groups of a grouped convolution: LoRA of PEFT does."""
        layer = self.place.layer
        if layer is None or layer.groups == 1 or self.update.makes_anew:
            return False
        return self.update.shape[1] == layer.shape[1]


class Weight:
    """W' of one parameter.

    Attributes:
        lazy: the parameter, computed anew for whoever reads it.
        steps: the updates, in order.
        called: whether the module read it in its own call.
        lent: whether somebody else read it.
        apart: whether each of the two sees the updates that mean it, or both see all.
    """

    def __init__(self, base: torch.Tensor | LazyTensor) -> None:
        key = ("weight form", id(self))
        self.lazy = LazyTensor(tuple(base.shape), base.dtype, self._read, key, cache=False)
        self.steps: list[Step] = []
        self.called = self.lent = self.apart = False
        self._base = base
        self._depth = 0

    def add(self, step: Step, beside: Collection[str] = ()) -> None:
        """Takes another update.

        Args:
            step: the update.
            beside: names of the adapters that stood at the layer.

        Raises:
            NoWeightFormError: of a grouped convolution, one mixes the groups and another does not.
        """
        place = len(self.steps)
        while place and _goes_before(step, self.steps[place - 1], beside):
            place -= 1
        if place < len(self.steps):
            after = self.steps[place]
            self.steps[place] = replace(after, summed=True)
            step = replace(step, summed=after.summed)
        self.steps.insert(place, step)
        if len({step.is_whole for step in self.steps}) > 1:
            raise NoWeightFormError(f"updates of two kinds at {step.place.leaf}, a grouped weight")

    @property
    def has_effect(self) -> bool:
        """Whether any input could tell W' from W."""
        return any(step.update.has_effect() for step in self.steps)

    def watch(self, module: nn.Module) -> None:
        """Tells the module's own reads from those of others, for the time of a run."""
        self._depth = 0
        if any(step.is_whole for step in self.steps):
            module.__dict__["groups"] = 1
        module.register_forward_pre_hook(self._entered)
        module.register_forward_hook(self._left)

    def _entered(self, *_: Any) -> None:
        self._depth += 1

    def _left(self, *_: Any) -> None:
        self._depth -= 1

    def _read(self) -> torch.Tensor:
        self.called |= self._depth > 0
        self.lent |= self._depth == 0
        steps, base = self.steps, evaluate(self._base)
        if self.apart:
            steps = [step for step in steps if step.place.inside == (self._depth > 0)]
        layer = steps[0].place.layer if steps else None
        if layer is not None and steps[0].is_whole:
            own = layer.type.canonical("weight", base, layer.groups)
            base = layer.type.store("weight", ungrouped(own, layer.groups))
        return composed(base, steps, Step.weight).to(self.lazy.dtype)


def composed(
    base: torch.Tensor, steps: Sequence[Step], act: Callable[[Step, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """All updates: those that stand beside each other are summed, a later one acts on the sum.

    Of those that make a weight anew, each acts on what the one before it made.
    """
    start = total = base
    for step in steps:
        if not step.summed:
            start = total
        made = act(step, start)
        total = made if total is start else total + (made - start)
        start = made if step.makes_anew else start
    return total


def _goes_before(step: Step, other: Step, beside: Collection[str]) -> bool:
    """Whether one acts on what a layer reads: of the weight, before an earlier of its like."""
    both = {step.update.stacks, other.update.stacks} == {"inputs first"}
    return both and other.owner.adapter.name in beside


def shifted(own: torch.Tensor | LazyTensor | None, steps: Sequence[Step]) -> torch.Tensor | None:
    """The bias after all updates; None if there is none before and after."""
    if own is not None:
        bias = evaluate(own)
        return composed(widened(bias), steps, Step.bias).to(bias.dtype)
    biases = [step.update.bias for step in steps if step.update.bias is not None]
    if not biases:
        return None
    made, layer = composed(torch.zeros_like(biases[0]), steps, Step.bias), steps[0].place.layer
    return made if layer is None else made.to(layer.dtype)  # a sum is made in float32 or wider


def ungrouped(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """The weight of the convolution without groups that computes the same."""
    out, into, *kernel = weight.shape
    whole: torch.Tensor = torch.block_diag(*weight.flatten(1).chunk(groups))  # type: ignore[no-untyped-call]
    return whole.reshape(out, into * groups, *kernel)


__all__ = ["Layer", "Step", "Weight", "composed", "shifted", "ungrouped"]
