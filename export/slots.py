"""Adapters as inputs: where they go in, what they are called, and the manifest that says so."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from lora_fx.adapter import Adapter, Update
from lora_fx.branches import branches, parameter_names
from lora_fx.errors import ExportError, shorten
from lora_fx.export.manifest import Slot
from lora_fx.sites import Site, by_path
from lora_fx.trace import example_of

PROBE = "probe"


def chosen_slots(gm: fx.GraphModule, wanted: str | Sequence[str] | None) -> list[Slot]:
    """The layers that an adapter shall be able to act on.

    Args:
        gm: a graph, with branches or without.
        wanted: module paths, ``"all-linear"``, or None: the layers that have a branch, and if
            there is none, all linear layers but the output embedding.

    Raises:
        ExportError: a path is no linear layer, or there is none.
    """
    groups = by_path(gm)
    paths = _paths(gm, groups, wanted)
    unknown = [path for path in paths if path not in groups]
    if unknown:
        known = shorten(list(groups))
        raise ExportError(f"slots: no linear layer at {shorten(unknown)}; there are {known}")
    if not paths:
        raise ExportError('adapters="input": the graph has no linear layer to adapt')
    return [_slot(groups[path][0]) for path in dict.fromkeys(paths)]


def _paths(
    gm: fx.GraphModule, groups: dict[str, list[Site]], wanted: str | Sequence[str] | None
) -> list[str]:
    if isinstance(wanted, str) and wanted != "all-linear":
        raise ExportError(f'slots={wanted!r}: give "all-linear" or a list of module paths')
    if wanted is not None:
        return list(groups) if wanted == "all-linear" else list(wanted)
    example = example_of(gm)
    head = example.output_embedding if example else None
    branched = [branch.path for branch in branches(gm)]
    return branched or [path for path in groups if path != head]


def _slot(site: Site) -> Slot:
    kind = "linear_transposed" if site.transposed else "linear"
    dtype = str(site.dtype).removeprefix("torch.")
    return Slot(site.path, kind, site.in_features, site.out_features, dtype)


_GAIN = 0.25


def probe(slots: Sequence[Slot], ranks: Sequence[int], seed: int = 0) -> Adapter:
    """A random adapter that fills every slot, with the given ranks in turn.

    It adds a quarter of what goes in: plain to see, and not so much that a deep model saturates
    and its rounding errors grow beyond what is measured.
    """
    source = torch.Generator().manual_seed(seed)
    updates = {}
    for place, slot in enumerate(slots):
        rank, dtype = ranks[place % len(ranks)], getattr(torch, slot.dtype)
        down = torch.randn(rank, slot.in_features, generator=source) / slot.in_features**0.5
        up = torch.randn(slot.out_features, rank, generator=source) / rank**0.5
        updates[slot.path] = Update(down.to(dtype), up.to(dtype), _GAIN)
    return Adapter(PROBE, updates)


def open_slots(model: ir.Model, slots: Sequence[Slot]) -> None:
    """Turns the probe's initializers into graph inputs, of symbolic rank, in place.

    They get no default yet: an optimiser may evaluate what has one.
    """
    for slot in slots:
        rank = ir.SymbolicDim(f"rank:{slot.path}")
        down, up, _ = parameter_names(slot.path, PROBE)
        if down not in model.graph.initializers:
            down, up, _ = parameter_names(slot.path, PROBE, bare=True)
        a = _as_input(model, down, slot.down, ir.Shape([slot.in_features, rank]))
        b = _as_input(model, up, slot.up, ir.Shape([rank, slot.out_features]))
        _forget_rank(a, until=b)


def _as_input(model: ir.Model, old: str, new: str, shape: ir.Shape) -> ir.Value:
    value = model.graph.initializers.pop(old, None)
    if value is None:
        raise ExportError(f"slot {new}: the exported graph lost it; please report the model")
    value.const_value, value.name, value.shape = None, new, shape
    model.graph.inputs.append(value)
    return value


def _forget_rank(start: ir.Value, until: ir.Value) -> None:
    """Clears the shapes between A and B: they were recorded with the probe's rank."""
    open_values, seen = [start], {start}
    while open_values:
        for node in open_values.pop().consumers():
            if until in node.inputs:
                continue
            for value in set(node.outputs) - seen:
                value.shape = None
                seen.add(value)
                open_values.append(value)


def set_defaults(model: ir.Model, slots: Sequence[Slot]) -> None:
    """Gives each slot a default of rank 0: a file run without an adapter is the base."""
    inputs = {value.name: value for value in model.graph.inputs}
    for slot in slots:
        for name, shape in ((slot.down, (slot.in_features, 0)), (slot.up, (0, slot.out_features))):
            value = inputs[name]
            assert value.dtype is not None
            empty = np.zeros(shape, dtype=value.dtype.numpy())
            value.const_value = ir.Tensor(empty, dtype=value.dtype, name=name)
            model.graph.initializers[name] = value
