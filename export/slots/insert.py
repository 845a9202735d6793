"""Adapters as inputs: where they go in, what they are called, and the manifest that says so."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch
from torch import fx

from lora_fx.adapters.adapter import Adapter, Update
from lora_fx.errors import ExportError, shorten
from lora_fx.export.slots.manifest import Slot
from lora_fx.graph.example import aliases_of, example_of
from lora_fx.injection.match_branch import branches, parameter_names
from lora_fx.layers.sites import Site, by_path
from lora_fx.layers.weight_readers import is_one_way

PROBE = "probe"


def chosen_slots(
    gm: fx.GraphModule, wanted: str | Sequence[str] | None, vectors: bool | None = None
) -> list[Slot]:
    """The layers that an adapter shall be able to act on.

    Args:
        gm: a graph, with branches or without.
        vectors: whether they take the vectors of DoRA and (IA)3 as well; None: if a branch does.
        wanted: module paths, ``"all-linear"``, or None: the layers that have a branch, and if
            there is none, all linear layers but the output embedding.

    Raises:
        ExportError: a path is no layer, or there is none, or it is a grouped convolution.
    """
    groups = by_path(gm)
    paths = _paths(gm, groups, wanted)
    unknown = [path for path in paths if path not in groups]
    if unknown:
        known = shorten(list(groups)) or "none"
        raise ExportError(f"slots: no layer at {shorten(unknown)}; there are {known}")
    if not paths:
        raise ExportError('adapters="input": the graph has no linear layer to adapt')
    grouped = [path for path in paths if groups[path][0].groups > 1]
    if grouped:
        raise ExportError(
            f"slots: {shorten(grouped)}: what a grouped convolution adds is shaped by its adapter; "
            "leave it out, or export the adapter as a constant"
        )
    both = [path for path in paths if not is_one_way(groups[path])]
    if both:
        raise ExportError(
            f"slots: {shorten(both)}: one call multiplies with the weight, another with its "
            "transpose, and a slot stands beside one side alone; leave it out of slots="
        )
    if vectors is None:
        vectors = any(not b.is_plain or b.bias is not None for b in branches(gm))
    return [_slot(groups[path][0], vectors) for path in _once(gm, paths)]


def _once(gm: fx.GraphModule, paths: Sequence[str]) -> list[str]:
    """One path for each layer: of a module that has several names, the first in the model."""
    others = aliases_of(gm)
    order = {path: place for place, path in enumerate(others)}
    named = ({path, *others.get(path, ())} & {*paths} for path in paths)
    return list(dict.fromkeys(min(names, key=lambda n: order.get(n, 0)) for names in named))


def _paths(
    gm: fx.GraphModule, groups: dict[str, list[Site]], wanted: str | Sequence[str] | None
) -> list[str]:
    if isinstance(wanted, str) and wanted != "all-linear":
        raise ExportError(f'slots={wanted!r}: give "all-linear" or a list of module paths')
    linear = [path for path, calls in groups.items() if _is_linear_module(calls[0])]
    if wanted is not None:
        return linear if wanted == "all-linear" else list(wanted)
    example = example_of(gm)
    head = example.output_embedding if example else None
    branched = [branch.path for branch in branches(gm)]
    return branched or [path for path in linear if path != head]


def _is_linear_module(site: Site) -> bool:
    """Whether all linear layers are meant to hold it: a product that is written out is named."""
    return site.is_linear and not (site.spelled and site.bare)


def _slot(site: Site, vectors: bool) -> Slot:
    out, into, *kernel = site.shape
    dtype = str(site.dtype).removeprefix("torch.")
    return Slot(site.path, site.kind, into, out, dtype, tuple(kernel), vectors)


_GAIN = 0.25


def probe(slots: Sequence[Slot], ranks: Sequence[int], seed: int = 0) -> Adapter:
    """A random adapter that fills every slot, with the given ranks in turn.

    It adds a quarter of what goes in: plain to see, and not so much that a deep model saturates
    and its rounding errors grow beyond what is measured.
    """
    source = torch.Generator().manual_seed(seed)
    return Adapter(
        PROBE,
        {
            slot.path: _probe(slot, ranks[place % len(ranks)], source)
            for place, slot in enumerate(slots)
        },
    )


def _probe(slot: Slot, rank: int, source: torch.Generator) -> Update:
    layer = slot.layer

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=source)

    out, into, *kernel = layer.shape
    fan_in = 1 if layer.type.reads_ids else math.prod(layer.shape[1:])
    down, up = random(rank, into, *kernel) / fan_in**0.5, random(out, rank) / rank**0.5
    dtype = layer.dtype
    row = (1 + _GAIN * random(out)).to(dtype) if slot.vectors else None
    bias = random(out).to(dtype) if slot.vectors else None
    col = (1 + _GAIN * random(into)).to(dtype) if "col" in slot.inputs else None
    return Update(down.to(dtype), up.to(dtype), _GAIN, row=row, bias=bias, col=col)


def open_slots(model: ir.Model, slots: Sequence[Slot], others: Mapping[str, Sequence[str]]) -> None:
    """Turns the probe's initializers into graph inputs, of symbolic rank, in place.

    They get no default yet: an optimiser may evaluate what has one.

    Args:
        model: what was exported.
        slots: where the probe is.
        others: other names of a slot's module, whose calls read the same inputs.
    """
    for slot in slots:
        rank = ir.SymbolicDim(f"rank:{slot.path}")
        names = parameter_names(slot.path, PROBE)
        if names.down not in model.graph.initializers:
            names = parameter_names(slot.path, PROBE, bare=True)
        opened = {}
        for part, (name, sizes) in slot.inputs.items():
            shape = ir.Shape([rank if size is None else size for size in sizes])
            opened[part] = _as_input(model, getattr(names, part), name, shape)
            for other in others.get(slot.path, ()):
                again = getattr(parameter_names(other, PROBE), part)
                _read_instead(model, again, opened[part])
        _forget_rank(opened["down"], until=opened["up"])


def _as_input(model: ir.Model, old: str, new: str, shape: ir.Shape) -> ir.Value:
    value = model.graph.initializers.pop(old, None)
    if value is None:
        raise ExportError(f"slot {new}: the exported graph lost it; please report the model")
    value.const_value, value.name, value.shape = None, new, shape
    model.graph.inputs.append(value)
    return value


def _read_instead(model: ir.Model, old: str, new: ir.Value) -> None:
    value = model.graph.initializers.pop(old, None)
    if value is not None:
        ir.convenience.replace_all_uses_with(value, new)


def _forget_rank(start: ir.Value, until: ir.Value) -> None:
    """Clears the shapes between A and B: they were recorded with the probe's rank.

    Of a packed projection that is read in parts, each call expands with a part of B.
    """
    picks = [node for node in until.consumers() if node.op_type in ("Slice", "Gather")]
    parts = [out for node in picks for out in node.outputs]
    for part in parts:
        part.shape = None
    ends = {until, *parts}
    open_values, seen = [start], {start}
    while open_values:
        for node in open_values.pop().consumers():
            if not ends.isdisjoint(node.inputs):
                continue
            for value in set(node.outputs) - seen:
                value.shape = None
                seen.add(value)
                open_values.append(value)


def set_defaults(model: ir.Model, slots: Sequence[Slot]) -> None:
    """Gives each slot a default without effect: a file run without an adapter is the base."""
    inputs = {value.name: value for value in model.graph.inputs}
    for slot in slots:
        for name, tensor in slot.neutral().items():
            value = inputs[name]
            assert value.dtype is not None
            empty = tensor.float().numpy().astype(value.dtype.numpy())
            value.const_value = ir.Tensor(empty, dtype=value.dtype, name=name)
            model.graph.initializers[name] = value
