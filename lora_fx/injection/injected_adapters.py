"""What was injected into a graph, as it was given: what the graph must then compute.

The graph itself says what it computes. This says what was meant, so that a branch which gets lost
on the way is missed. It rides along in ``gm.meta``; a pickle drops it.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from lora_fx.adapters.adapter import Adapter, AnyUpdate, Update, WeightUpdate
from lora_fx.adapters.other_updates import anew, evaluated
from lora_fx.adapters.updates import activated
from lora_fx.errors import AdapterError, VerificationError, shorten
from lora_fx.graph.graph_module import targets
from lora_fx.graph.lazy_tensor import LazyTensor, find_tensor
from lora_fx.injection.bind import Binding
from lora_fx.injection.branch_tensors import BranchTensors, update_of
from lora_fx.injection.branches import Beside
from lora_fx.injection.invocation_mask import HOLDER
from lora_fx.layers.adapter_tensors import parameter_names, value_names
from lora_fx.layers.layer import Layer
from lora_fx.layers.sites import Groups

_META = "lora_fx.injected"
_VALUE = "value"
Held = torch.Tensor | LazyTensor


@dataclass(frozen=True, eq=False)
class Bound:
    """What one update became at one layer of a graph.

    Attributes:
        layer: the layer, or None for a parameter that no layer alone reads.
        names: part (a field of `BranchTensors`, or ``value 0`` and so on) -> name of the constant.
        prints: a checksum of each.
        scale: the factor of the low-rank part that is not folded in.
        beside: names of adapters that stood at the layer: what was folded before is its base.
    """

    layer: Layer | None
    names: Mapping[str, str]
    prints: Mapping[str, int]
    scale: float
    beside: frozenset[str]

    @classmethod
    def of(
        cls, gm: fx.GraphModule, adapter: str, path: str, update: AnyUpdate, groups: Groups,
        beside: Beside, scale: float = 1.0,
    ) -> Bound:  # fmt: skip
        """What has just been put into a graph, under those of its names that are there."""
        # A dense update of a grouped convolution is one value, however many it was given as.
        count = len(update.values) or 1
        site = groups[path][0] if path in groups else None
        layer, bare = (None, True) if site is None else (site.layer, site.bare)
        names = parameter_names(path, adapter, bare)._asdict()
        values = value_names(path, adapter, count, bare)
        names |= {value_part(place): name for place, name in enumerate(values)}
        held = _held(gm, names)
        prints = {part: _print(value) for part, value in held.items()}
        kept = {part: names[part] for part in held}
        return cls(layer, kept, prints, scale, beside.get(path, frozenset()))

    def now(self, gm: fx.GraphModule, update: AnyUpdate) -> AnyUpdate | None:
        """The update with the values that the graph has now; None if it has them no more."""
        held = _held(gm, self.names)
        if len(held) < len(self.names):
            return None
        if all(_print(value) == self.prints[part] for part, value in held.items()):
            return update
        held = {part: value.detach().clone() for part, value in held.items()}
        if isinstance(update, Update) and value_part(0) in held:
            is_one = value_part(1) not in held  # a grouped convolution's product is multiplied
            update = evaluated(update, update.shape, None) if is_one else anew(update)
        if isinstance(update, WeightUpdate):
            values = [held[value_part(place)] for place in range(len(update.values))]
            bias = held["bias"].flatten() if "bias" in held else None
            return replace(update.with_values(values), bias=bias, stored=None)
        assert self.layer is not None
        return activated(
            update_of(BranchTensors(**held), self.layer, self.scale), update.invocation
        )


@dataclass(frozen=True, eq=False)
class Injected:
    """One adapter in a graph.

    Attributes:
        adapter: what was injected, by the paths that it was given with.
        tensors: how many tensors it held when it was given, those left out included.
        fresh: whether it came of a config, so that its values are the graph's alone.
        bound: path -> what its update became, at each layer that the path means.
        before: name of a tensor that it replaced -> what stood there.
        lost: paths whose branches trained, and were gone when a pass first looked.
    """

    adapter: Adapter
    tensors: int
    fresh: bool
    bound: Mapping[str, tuple[Bound, ...]]
    lost: tuple[str, ...] = ()
    before: Mapping[str, Held] = field(default_factory=dict)

    def now(self, gm: fx.GraphModule) -> Adapter:
        """The adapter with the values that it has now, if it was trained.

        Raises:
            VerificationError: a branch that trained is no longer in the graph.
        """
        pinned = self.pinned(gm)
        lost = pinned.lost if self.fresh else self.lost
        if lost:
            raise VerificationError(
                f"adapter {self.adapter.name}: its branches at {shorten(list(lost))} are no longer "
                "in the graph: a pass has lost them; strip an adapter with passes.StripLora"
            )
        return pinned.adapter

    def pinned(self, gm: fx.GraphModule) -> Injected:
        """The same with the values that the graph has now, for when it has them no more."""
        updates, lost = {}, list(self.lost)
        for path, update in self.adapter.updates.items():
            present = [bound.now(gm, update) for bound in self.bound.get(path, ())]
            found = [value for value in present if value is not None]
            lost += [path] if self.fresh and not found else []
            changed = [value for value in found if value is not update]
            updates[path] = changed[0] if changed else update
        adapter = replace(self.adapter, updates=updates)
        return replace(self, adapter=adapter, fresh=False, lost=tuple(dict.fromkeys(lost)))


class Records(tuple[Injected, ...]):
    """All that was injected into a graph, in order."""

    def after(self, before: fx.GraphModule, now: fx.GraphModule) -> Records:
        """The same once a pass has edited the graph: what it folded away keeps its last values."""
        gone = targets(before.graph).keys() - targets(now.graph).keys()
        return Records(r.pinned(before) if _names(r) & gone else r for r in self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Records:
        """A copy of a graph is of the same adapters."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled graph remembers none."""
        return Records, ()


def injected(gm: fx.GraphModule) -> Records:
    """What a graph remembers."""
    records = gm.meta.get(_META)
    return records if isinstance(records, Records) else Records()


def add(gm: fx.GraphModule, record: Injected) -> None:
    """Makes a graph remember one more; what another of its name called its constants is over."""
    taken = _names(record)
    remember(gm, [*(_unnamed(known, taken) for known in injected(gm)), record])


def remember(gm: fx.GraphModule, records: Sequence[Injected]) -> None:
    """Makes a graph remember these."""
    gm.meta[_META] = Records(records)


def note_binding(
    gm: fx.GraphModule,
    binding: Binding,
    groups: Groups,
    beside: Beside,
    skipped: Collection[str],
    before: Mapping[str, Held],
) -> None:
    """Makes a graph remember an adapter that has just been put into it.

    Args:
        gm: the graph.
        binding: of the adapter to the graph's layers.
        groups: the calls of the layers.
        beside: which adapters stood at each layer already.
        skipped: replaced tensors that were left out.
        before: what stood in the place of those that were replaced, by name.

    Raises:
        AdapterError: an update has not come into the graph.
    """
    given = binding.adapter
    bound = {
        path: tuple(
            Bound.of(gm, given.name, name, binding.updates[name], groups, beside) for name in names
        )
        for path, names in binding.meant.items()
    }
    unnamed = [path for path, several in bound.items() if not all(b.names for b in several)]
    lost = [path for path in unnamed if any(t.numel() for t in given.updates[path].tensors())]
    if lost:
        raise AdapterError(
            f"adapter {given.name}: the updates of {shorten(lost)} have not come into the graph; "
            "please report the model"
        )
    kept = {path: given.updates[path] for path in bound}
    replaced = {n: t for n, t in given.replacements.items() if n not in skipped}
    known = replace(given, updates=kept, replacements=replaced)
    add(gm, Injected(known, tensors_of(given), False, bound, before=before))


def note_fresh(gm: fx.GraphModule, adapter: Adapter, groups: Groups, beside: Beside) -> None:
    """Makes a graph remember an adapter that trains, whose values are the graph's alone."""
    bound = {
        path: (Bound.of(gm, adapter.name, path, update, groups, beside, update.scale),)  # type: ignore[attr-defined]
        for path, update in adapter.updates.items()
    }
    add(gm, Injected(adapter, tensors_of(adapter), True, bound))


def tensors_of(adapter: Adapter) -> int:
    """How many tensors an adapter holds, one that several updates share once."""
    held = (t for update in adapter.updates.values() for t in held_by(update))
    return len({id(tensor) for tensor in (*held, *adapter.replacements.values())})


def held_by(update: AnyUpdate) -> list[object]:
    """The tensors of an update as its file has them."""
    stored = list(update.stored.tensors.values()) if update.stored else []
    return [*stored] or [*update.tensors()]


def folded_paths(gm: fx.GraphModule, name: str) -> list[str]:
    """Where an adapter was put into a graph that has its constants no more."""
    bound = {p: b for r in injected(gm) if r.adapter.name == name for p, b in r.bound.items()}
    known = targets(gm.graph).keys()
    return [p for p, several in bound.items() if any({*b.names.values()} - known for b in several)]


def value_part(place: int) -> str:
    """What the n-th value of a weight that is made anew is called among the parts."""
    return f"{_VALUE} {place}"


def unreplaced(gm: fx.GraphModule, name: str | None) -> dict[str, Held]:
    """Forgets what an adapter replaced, or all did: what stood there before, by name.

    What another adapter has replaced by the same stays replaced, and is that one's.
    """
    gone = [r for r in injected(gm) if name in (None, r.adapter.name)]
    given_back = {n: value for record in gone for n, value in record.before.items()}
    left = []
    for record in injected(gm):
        adapter, before = replace(record.adapter, replacements={}), dict[str, Held]()
        if record not in gone:
            adapter = record.adapter
            own = {n: given_back.pop(n) for n in adapter.replacements if n in given_back}
            before = {**record.before, **own}
        left.append(replace(record, adapter=adapter, before=before))
    remember(gm, left)
    return given_back


def stripped(gm: fx.GraphModule, gone: set[str]) -> bool:
    """Forgets what a pass has taken out on purpose.

    Returns:
        Whether all of the constants that went were of adapters that the graph remembers.
    """
    known: set[str] = set().union(*map(_names, injected(gm)))
    left = (_without(record, gone) for record in injected(gm))
    remember(gm, [r for r in left if r.adapter.updates or r.adapter.replacements])
    return all(name in known or name.startswith(f"{HOLDER}.") for name in gone)


def _unnamed(record: Injected, taken: set[str]) -> Injected:
    bound = {
        path: tuple(
            b if taken.isdisjoint(b.names.values()) else replace(b, names={}) for b in several
        )
        for path, several in record.bound.items()
    }
    return replace(record, bound=bound)


def _without(record: Injected, gone: set[str]) -> Injected:
    bound = {
        path: tuple(b for b in several if gone.isdisjoint(b.names.values()))
        for path, several in record.bound.items()
    }
    # A path that is bound nowhere is a table that is never called: the others have its rows.
    updates = {p: u for p, u in record.adapter.updates.items() if bound[p] or not record.bound[p]}
    return replace(record, adapter=replace(record.adapter, updates=updates), bound=bound)


def _names(record: Injected) -> set[str]:
    return {name for several in record.bound.values() for b in several for name in b.names.values()}


def _held(gm: fx.GraphModule, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Part -> tensor, of those constants that a graph has."""
    found = {part: find_tensor(gm, name) for part, name in names.items()}
    return {part: value for part, value in found.items() if value is not None}


def _print(value: torch.Tensor) -> int:
    """A checksum of the bytes: ``p.data`` can be written to without a trace on ``p``."""
    held = value.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(held.view(torch.uint8).numpy().data)
