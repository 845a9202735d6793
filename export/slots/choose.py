"""Which slots a swappable model gets: what adapters change, or what was asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import get_args

import torch
from torch import fx

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.target_rule import ALL_LINEAR
from lora_fx.choices import SlotForm, takes
from lora_fx.errors import ExportError, shorten
from lora_fx.export.slots.manifest import DTYPES
from lora_fx.export.slots.slot import (
    INVOCATION,
    AnySlot,
    ExpertSlot,
    InvocationSlot,
    Slot,
    TensorSlot,
)
from lora_fx.export.slots.slot_values import FACTORS, VECTORS, WEIGHT, form_of, given_as
from lora_fx.graph.aliasing import Written
from lora_fx.graph.example import example_of, first_names
from lora_fx.graph.lazy_tensor import LazyTensor, get_unevaluated
from lora_fx.injection.bind import bind
from lora_fx.injection.branches import branches
from lora_fx.injection.injected_adapters import injected
from lora_fx.injection.invocation_mask import IDS
from lora_fx.layers.base_layers import BaseLayers, layers_in
from lora_fx.layers.parameter_readers import is_inside, readers
from lora_fx.layers.sites import Groups, Site, by_path, is_one_way, weight_name
from lora_fx.passes import StripLora

FORMS = get_args(SlotForm)
Wanted = str | Sequence[str] | Mapping[str, SlotForm] | None


@takes(ExportError)
def slots_for(gm: fx.GraphModule, adapters: Sequence[Adapter]) -> dict[str, SlotForm]:
    """What an export with ``adapters="input"`` leaves open for adapters, as its ``slots=``.

    Factors for what is of low rank, and whole tensors for what is replaced. A weight that is made
    anew (LoKr, OFT, a full difference) needs a whole one too: it is left out, since each adapter
    then has the size of the layer, and is yours to ask for.

    Args:
        gm: the traced model, with adapters or without.
        adapters: that shall be swapped.

    Returns:
        Path of a layer or a parameter -> ``"factors"``, ``"vectors"`` or ``"weight"``; with aLoRA
        among the adapters ``"input_ids"`` -> ``"invocation"``, the tokens from which on it acts.

    Raises:
        AdapterError: an adapter does not fit.
    """
    layers = layers_in(gm, by_path(gm))
    found: dict[str, SlotForm] = {}
    for adapter in adapters:
        binding = bind(layers, adapter)
        for path in binding.updates:
            form = form_of(given_as(binding, path), layers.get(path))
            if form is not None and found.get(path) != VECTORS:
                found[path] = form
        found |= dict.fromkeys(_changed(layers, binding.replaced), WEIGHT)
        if any(update.invocation for update in binding.updates.values()):
            found[IDS] = INVOCATION
    return found


def _changed(layers: BaseLayers, replaced: Mapping[str, torch.Tensor]) -> list[str]:
    """Which of the replaced tensors are not the base's own, by the base's names."""
    own = {name: layers.parameter(name) for name in replaced}
    return [
        name
        for name, t in own.items()
        if t is None or (t.is_floating_point() and not torch.equal(replaced[name].to(t.dtype), t))
    ]


def chosen_slots(gm: fx.GraphModule, wanted: Wanted, vectors: bool | None = None) -> list[AnySlot]:
    """What an adapter shall be able to change.

    Args:
        gm: a graph, with adapters or without.
        wanted: paths of layers and parameters, or path -> form, where ``*`` stands for any part
            of a path; ``"all-linear"``; or None: what the adapters in the graph change, and if
            there is none, all linear layers but the output embedding.
        vectors: whether all take the vectors of DoRA and (IA)3 as well; None: if one needs to.

    Raises:
        ExportError: a path is no layer and no parameter, or there is none; or a layer has no
            side where factors could stand.
    """
    read, every = Written(gm.graph).needed(), by_path(gm)
    groups = {p: own for p, own in every.items() if any(site.node in read for site in own)}
    forms = _forms(gm, groups, wanted)
    if unread := [path for path in forms if path in every and path not in groups]:
        raise ExportError(
            f"slots: no output of the model depends on {shorten(unread)}, but a buffer alone, and "
            "a file has nothing of it: leave it out of the adapter, or give slots= without it"
        )
    if not forms:
        raise ExportError(
            'adapters="input": the graph has no linear layer to adapt, and no adapter in it has '
            f"factors: name its layers, slots=[...], which are {shorten(list(groups)) or 'none'}, "
            "or, for what makes a weight anew (LoKr, OFT), whole weights, "
            f'slots={{"<path>": "{WEIGHT}"}}'
        )
    beside = [path for path in groups if forms.get(path, WEIGHT) != WEIGHT]
    both = [path for path in beside if not is_one_way(groups[path])]
    if both:
        raise ExportError(
            f"slots: {shorten(both)}: one call multiplies with the weight, another with its "
            "transpose, and factors stand beside one side alone; leave it out of slots=, or ask "
            f'for its whole weight: {{"{both[0]}": "{WEIGHT}"}}'
        )
    if vectors is None:
        vectors = VECTORS in forms.values()
    layers = [_slot(groups[path][0], vectors) for path in first_names(gm, beside)]
    whole = [_tensor_slot(gm, name, groups) for name in _whole(gm, forms, groups)]
    aside = (WEIGHT, INVOCATION)
    experts = [p for p, form in forms.items() if form not in aside and p not in groups]
    tokens = [InvocationSlot(p) for p, form in forms.items() if form == INVOCATION]
    return [*layers, *(_expert_slot(gm, path) for path in experts), *whole, *tokens]


def _forms(gm: fx.GraphModule, groups: Groups, wanted: Wanted) -> dict[str, SlotForm]:
    """Path of a layer or a parameter -> form."""
    if wanted is None:
        example = example_of(gm)
        head = example.output_embedding if example else None
        linear = [path for path in _linear(groups) if path != head]
        return _in_graph(gm) or dict.fromkeys(linear, FACTORS)
    names = [wanted] if wanted == ALL_LINEAR else wanted
    is_list = isinstance(names, Collection) and not isinstance(names, str)
    if not is_list or not all(isinstance(name, str) for name in names):
        raise ExportError(f'slots={wanted!r:.80}: give "{ALL_LINEAR}" or a list of module paths')
    return _asked_for(gm, groups, names)


def _in_graph(gm: fx.GraphModule) -> dict[str, SlotForm]:
    """What the adapters in a graph change."""
    base = StripLora()(gm).graph_module
    found = slots_for(base, [record.now(gm) for record in injected(gm)])
    if inside := [name for name in found if is_inside(gm, name)]:
        raise _no_slot(inside)
    for branch in branches(gm):
        vectors = branch.gain, branch.bias, branch.col
        if vectors != (None, None, None):
            found[branch.path] = VECTORS
        elif found.get(branch.path) != VECTORS:  # a call without the layer's bias takes none
            found[branch.path] = FACTORS
        found |= {} if branch.mask is None else {IDS: INVOCATION}
    return found


def _asked_for(
    gm: fx.GraphModule, groups: Groups, wanted: Sequence[str] | Mapping[str, SlotForm]
) -> dict[str, SlotForm]:
    found: dict[str, SlotForm] = {}
    unknown = []
    for name in wanted:
        form = wanted[name] if isinstance(wanted, Mapping) else None
        if form not in (None, *FORMS):
            raise ExportError(f"slots: {name}: {form!r} is none of {', '.join(FORMS)}")
        if form == INVOCATION and name == IDS:
            found[name] = form
            continue
        paths = [name] if name in groups else [p for p in groups if fnmatchcase(p, name)]
        paths = _linear(groups) if name == ALL_LINEAR else paths
        if paths:
            found |= dict.fromkeys(paths, form or FACTORS)
        elif _is_parameter(gm, name):
            axes = len(parameter(gm, name).shape)
            is_factored = (axes == 3 and form is None) or (axes in (2, 3) and form == FACTORS)
            found[name] = FACTORS if is_factored else WEIGHT
        else:
            unknown.append(name)
    if inside := [name for name in unknown if is_inside(gm, name)]:
        raise _no_slot(inside)
    if unknown:
        known = shorten(list(groups)) or "none"
        raise ExportError(f"slots: no layer at {shorten(unknown)}; there are {known}")
    return found


def _no_slot(names: list[str]) -> ExportError:
    return ExportError(
        f"slots: {shorten(names)} lies in a module that symbolic tracing keeps whole, where no "
        "slot can stand: trace the model with example inputs, which opens it"
    )


def _is_parameter(gm: fx.GraphModule, name: str) -> bool:
    return any(True for _ in readers(gm, name))


def parameter(gm: fx.GraphModule, name: str) -> torch.Tensor | LazyTensor:
    """A parameter that the graph reads, by the path of the module that reads it."""
    found: torch.Tensor | LazyTensor = get_unevaluated(gm, str(next(readers(gm, name))[1].target))
    return found


def _whole(gm: fx.GraphModule, forms: Mapping[str, SlotForm], groups: Groups) -> list[str]:
    """The parameters that are slots themselves: of a layer its weight, and its bias if any."""
    asked = [path for path, form in forms.items() if form == WEIGHT]
    names = [path for path in asked if path not in groups]
    for path in first_names(gm, [path for path in asked if path in groups]):
        weight = weight_name(groups[path][0])
        bias = f"{weight.removesuffix('weight')}bias"
        is_told = weight.endswith("weight") and _is_parameter(gm, bias)
        names += [weight, bias] if is_told else [weight]
    return list(dict.fromkeys(names))


def _linear(groups: Groups) -> list[str]:
    """What all linear layers are: a product that is written out is named."""
    firsts = {path: calls[0] for path, calls in groups.items()}
    return [p for p, site in firsts.items() if site.is_linear and not (site.spelled and site.bare)]


def _slot(site: Site, vectors: bool) -> Slot:
    out, into, *kernel = site.shape
    return Slot(
        site.path, site.kind, into, out, _name(site.dtype), tuple(kernel), vectors,
        groups=site.groups,
    )  # fmt: skip


def _tensor_slot(gm: fx.GraphModule, name: str, groups: Groups) -> TensorSlot:
    tensor = parameter(gm, name)
    slot = TensorSlot(name, tuple(tensor.shape), _name(tensor.dtype))
    if slot.dtype not in DTYPES:
        raise ExportError(f"slots: {name} is of {slot.dtype}; expected one of {', '.join(DTYPES)}")
    site = next((calls[0] for calls in groups.values() if weight_name(calls[0]) == name), None)
    if site is None:
        return slot
    return replace(slot, layer_path=site.path, layer_kind=site.kind, groups=site.groups)


def _expert_slot(gm: fx.GraphModule, name: str) -> ExpertSlot:
    tensor = parameter(gm, name)
    return ExpertSlot(name, tuple(tensor.shape), _name(tensor.dtype))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
