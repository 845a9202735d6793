"""What a graph must compute, said without the graph: the module, run with W' in place of W.

Everything that was injected is put into the module that was traced, by path, as the weight form of
its update. Neither the sites nor the branches of a graph are asked: what was lost there is missed
here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from lora_fx.adapters.adapter import AnyUpdate
from lora_fx.graph.aliasing import written
from lora_fx.graph.example import example_of
from lora_fx.graph.lazy_tensor import evaluate, find_tensor, set_lazy
from lora_fx.graph.traced_module import TracedModule
from lora_fx.injection.injected_adapters import Injected, injected
from lora_fx.reference.activated import Activated, ids_of
from lora_fx.reference.merged_parameters import Step, Weight, shifted
from lora_fx.reference.module_layers import NoWeightFormError, Place, place_of, replaced

Slot = tuple[nn.Module, str]


class WeightForm:
    """A module whose weights are those that its adapters mean; called as the module is.

    Each weight is computed when it is read, and let go: there is no second copy of the model.

    Attributes:
        changed: how many weights and biases differ from the module's own.
    """

    def __init__(
        self, gm: fx.GraphModule, traced: TracedModule, records: Sequence[Injected]
    ) -> None:
        self._traced = traced
        self._values = _statistics(gm, traced)
        self._weights: dict[Slot, Weight] = {}
        self._biases: dict[Slot, list[Step]] = {}
        self._replaced: dict[Slot, str] = {}
        self._activated: dict[nn.Module, list[Activated]] = {}
        adapters = [(record, record.now(gm)) for record in records]
        for _, adapter in adapters:
            for name, value in adapter.replacements.items():
                module, leaf, store = replaced(traced, name)
                self._values[module, leaf] = value.to(store[leaf].dtype)
                self._replaced[module, leaf] = name
        for record, adapter in adapters:
            for path, update in adapter.updates.items():
                self._add(path, update, record)
        self._written = _written(gm, traced) - self._values.keys() - self._weights.keys()
        self.changed = sum(weight.has_effect for weight in self._weights.values())
        self.changed += sum(self._differs(slot) for slot in self._values)
        self.changed += len(self._activated)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module; what it writes to, inputs and tensors of its own, is a copy."""
        result = self._run(args, kwargs)
        split = [w for w in self._weights.values() if w.called and w.lent and not w.apart]
        if split:
            # Seen only now: the module is called, and others read its weight, who are not meant.
            for weight in split:
                weight.apart = True
            result = self._run(args, kwargs)
        return result

    def each_without(self) -> Iterator[tuple[str, WeightForm]]:
        """What it would be without one of the updates or replaced tensors, by its path."""
        slots = {slot: weight.steps[0].path for slot, weight in self._weights.items()}
        for slot, path in {**slots, **self._replaced}.items():
            other = copy.copy(self)
            other._weights = {at: w for at, w in self._weights.items() if at != slot}
            other._biases = {
                at: [step for step in steps if (step.place.module, step.place.leaf) != slot]
                for at, steps in self._biases.items()
            }
            other._values = {at: v for at, v in self._values.items() if at != slot}
            yield path, other
        for module, several in self._activated.items():
            other = copy.copy(self)
            other._activated = {at: a for at, a in self._activated.items() if at is not module}
            yield several[0].path, other

    def _run(self, args: Any, kwargs: Any) -> Any:
        def dress(model: nn.Module) -> None:
            self._dress()
            for module, several in self._activated.items():
                for one in several:
                    module.register_forward_hook(one.beside(ids_of(model, args, kwargs)))

        return self._traced.call(args, kwargs, dress)

    def _dress(self) -> None:
        """Puts the weights into the module, which is running and takes them off afterwards."""
        for (module, leaf), value in self._values.items():
            _put(module, leaf, value)
        for module, leaf in self._written:
            _put(module, leaf, evaluate(self._traced.parameters(module)[leaf]))
        for (module, leaf), weight in self._weights.items():
            set_lazy(module, leaf, weight.lazy)
            weight.watch(module)
        for (module, leaf), steps in self._biases.items():
            own = self._own(module, leaf)
            bias = shifted(own, steps)
            if bias is None:
                continue
            if leaf in self._traced.parameters(module):
                _put(module, leaf, bias)
            else:
                module.register_forward_hook(_adding(bias, steps))

    def _add(self, path: str, update: AnyUpdate, record: Injected) -> None:
        bounds = record.bound.get(path, ())
        hint = next((bound.layer for bound in bounds), None)
        place = place_of(self._traced, path, update, hint)
        if update.invocation:
            self._activated.setdefault(place.module, []).append(Activated.of(path, update, place))
            return
        slot = place.module, place.leaf
        if slot not in self._weights:
            self._weights[slot] = Weight(self._own(*slot))
        weight = self._weights[slot]
        beside: set[str] = set().union(*(bound.beside for bound in bounds))
        earlier = {step.owner.adapter.name for step in weight.steps}
        step = Step(record, path, update, place, summed=earlier <= beside)
        if any(s.owner is record and s.place.inside == place.inside for s in weight.steps):
            return  # another name of the same module, with the same numbers
        weight.add(step, beside)
        if not step.changes_bias:
            return
        if place.bias is None:
            raise NoWeightFormError(f"which bias belongs to {path} is not told by its name")
        self._biases.setdefault((place.module, place.bias), []).append(step)

    def _own(self, module: nn.Module, leaf: str) -> Any:
        """A parameter before any update: the module's, or what an adapter put in its place."""
        held = self._values.get((module, leaf))
        return self._traced.parameters(module).get(leaf) if held is None else held

    def _differs(self, slot: Slot) -> bool:
        module, leaf = slot
        own = self._traced.parameters(module).get(leaf)
        return own is not None and not torch.equal(evaluate(own), self._values[slot])


def weight_form(gm: fx.GraphModule, records: Sequence[Injected] | None = None) -> WeightForm | str:
    """The weight form of a graph, or why it has none.

    Args:
        gm: the graph.
        records: what to put in; all that the graph remembers by default.

    Raises:
        VerificationError: a branch that trained is no longer in the graph.
    """
    example = example_of(gm)
    if example is None or example.model is None:
        return "it does not remember the module that was traced"
    try:
        return WeightForm(gm, example.model, injected(gm) if records is None else records)
    except NoWeightFormError as error:
        return str(error)


def _put(module: nn.Module, leaf: str, value: torch.Tensor) -> None:
    buffers = module.__dict__["_buffers"]
    if leaf in buffers:
        buffers[leaf] = value.clone()
    else:
        module.__dict__["_parameters"][leaf] = nn.Parameter(value.clone(), requires_grad=False)


def _adding(bias: torch.Tensor, steps: Sequence[Step]) -> Any:
    layer = steps[0].place.layer
    shift = bias if layer is None else layer.type.store("vector", bias)
    return lambda module, inputs, output: output + shift


def _statistics(gm: fx.GraphModule, traced: TracedModule) -> dict[Slot, torch.Tensor]:
    """Buffers that the graph has its own of: training moves them there, and not in the module."""
    found: dict[Slot, torch.Tensor] = {}
    for path, module in traced.modules.items():
        for leaf, value in traced.buffers(module).items():
            held = find_tensor(gm, f"{path}.{leaf}".removeprefix("."))
            if value is None or held is None or held is value or held.shape != value.shape:
                continue
            found[module, leaf] = held
    return found


def _written(gm: fx.GraphModule, traced: TracedModule) -> set[Slot]:
    """Parameters that a call writes to."""
    names = {str(node.target) for node in written(gm.graph) if node.op == "get_attr"}
    paths = (name.rpartition(".") for name in names)
    found = {(traced.modules.get(path), leaf) for path, _, leaf in paths}
    return {(m, n) for m, n in found if m is not None and traced.parameters(m).get(n) is not None}


__all__ = ["NoWeightFormError", "Place", "WeightForm", "weight_form"]
