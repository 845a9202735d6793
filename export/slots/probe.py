"""A random adapter for every slot: what a swappable model is traced with, and tried on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

from lora_fx.adapters.adapter import Adapter, AnyUpdate, Update, WeightUpdate
from lora_fx.adapters.other_updates import added_to_each
from lora_fx.adapters.updates import activated
from lora_fx.export.slots.choose import parameter
from lora_fx.export.slots.slot import AnySlot, ExpertSlot, InvocationSlot, Slot
from lora_fx.graph.lazy_tensor import evaluate
from lora_fx.numerics import widened

PROBE = "probe"
TRIED_RANKS = (1, 4, 2, 7)  # in turn: none is the one that is traced with
PROBED = (1, 2)  # tokens that every vocabulary has
_GAIN = 0.25


def probe(
    slots: Sequence[AnySlot],
    ranks: Sequence[int],
    seed: int = 0,
    base: fx.GraphModule | None = None,
) -> Adapter:
    """A random adapter that fills every slot, with the given ranks in turn.

    It adds a quarter of what goes in: plain to see, and not so much that a deep model saturates
    and its rounding errors grow beyond what is measured.

    Args:
        slots: to fill.
        ranks: of the factors.
        seed: of the random numbers.
        base: the graph without adapters, whose tensors are those that are changed.
    """
    source = torch.Generator().manual_seed(seed)
    updates: dict[str, AnyUpdate] = {}
    replaced = {}
    tokens = PROBED if any(isinstance(slot, InvocationSlot) for slot in slots) else ()
    for place, slot in enumerate(slots):
        rank = ranks[place % len(ranks)]
        if isinstance(slot, InvocationSlot):
            continue
        if isinstance(slot, Slot):
            found = _probe(slot, rank, source)
            updates[slot.path] = activated(found, tokens) if slot.layer.is_linear else found
        elif isinstance(slot, ExpertSlot):
            updates[slot.path] = _probe_of_experts(slot, rank, source)
        elif base is not None:
            own = evaluate(parameter(base, slot.path)).detach()
            replaced[slot.path] = _nearby(own, source)
    return Adapter(PROBE, updates, replaced)


def _nearby(own: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """Numbers of the same signs, a quarter larger or smaller; where all are zero, small ones."""
    random = torch.rand(own.shape, generator=source) * 2 - 1
    changed = widened(own) * (1 + _GAIN * random) if bool(own.any()) else _GAIN * random
    return changed.to(own.dtype)


def _probe_of_experts(slot: ExpertSlot, rank: int, source: torch.Generator) -> AnyUpdate:
    *experts, rows, columns = slot.shape
    up = torch.randn(*experts, rows, rank, generator=source) * _GAIN / rank**0.5
    down = torch.randn(*experts, rank, columns, generator=source) / columns**0.5
    function = added_to_each(up.to(slot.torch_dtype), down.to(slot.torch_dtype))
    return WeightUpdate("lora", function, slot.shape)


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
