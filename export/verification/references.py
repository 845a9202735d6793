"""What a file is held against: the module with its adapters, or the graph where that is unknown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import fx

from lora_fx.adapters.adapter import Adapter
from lora_fx.export.report import Coverage, Reference
from lora_fx.export.verification.eager import evaluating
from lora_fx.injection.branches import branches
from lora_fx.injection.injected_adapters import Injected, injected, tensors_of
from lora_fx.injection.read_adapter import adapter_from
from lora_fx.layers.adapter_tensors import parametrized_weights
from lora_fx.passes import StripLora
from lora_fx.reference.reference_run import WeightForm, weight_form


def reference(
    what: str, gm: fx.GraphModule, file: Path | None = None, *, once: bool = False
) -> Reference:
    """The eager model of a graph.

    Args:
        what: its name in the report.
        gm: the graph, which says by its precision what can be asked of it.
        file: the adapter file to run with.
        once: at the traced shape alone.

    Raises:
        VerificationError: a branch that trained is no longer in the graph.
    """
    form = weight_form(gm)
    if isinstance(form, WeightForm):
        return Reference(what, form, file, gm, _coverage(injected(gm), form), once)
    note = f"{what}: held against the graph itself: {form}"
    return Reference(what, evaluating(gm), file, once=once, notes=(note,))


def swapped(gm: fx.GraphModule) -> Iterator[tuple[Adapter, fx.GraphModule]]:
    """Each adapter in a graph, and the graph with it alone."""
    anew = [made.adapter for made in parametrized_weights(gm.graph)]
    replacing = [r.adapter.name for r in injected(gm) if r.before]
    names = list(dict.fromkeys([*(branch.name for branch in branches(gm)), *anew, *replacing]))
    for name in names:
        alone = gm
        for other in names:
            alone = alone if other == name else StripLora(other)(alone).graph_module
        records = [r for r in injected(alone) if r.adapter.name == name and _acts(r)]
        yield records[-1].now(alone) if records else adapter_from(alone, name), alone


def _acts(record: Injected) -> bool:
    return bool(record.adapter.updates or record.before)


def _coverage(records: tuple[Injected, ...], form: WeightForm) -> Coverage | None:
    if not records:
        return None
    adapters = [record.adapter for record in records]
    used = sum(map(tensors_of, adapters))
    name = " + ".join(adapter.name for adapter in adapters)
    return Coverage(name, sum(record.tensors for record in records), used, form.changed)
