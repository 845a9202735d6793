"""A graph with adapters, and what it was made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from torch import fx

from lora_fx.errors import PassError
from lora_fx.graph.editor import origins
from lora_fx.injection.bind import Binding, bind
from lora_fx.injection.branches import branches, free_name
from lora_fx.injection.injected_adapters import injected
from lora_fx.injection.read_adapter import adapter_from
from lora_fx.layers.base_layers import BaseLayers


@dataclass(frozen=True)
class Stages:
    """A graph with adapters, and what it was made of.

    Attributes:
        gm: as it is: adapters injected, trained, folded, or written into the model by somebody.
        whole: before it was folded.
        raised: the same, what the model itself adds to its layers as branches of ``name``.
        base: without any adapter.
        name: of the adapter that the model itself holds, if any.
    """

    gm: fx.GraphModule
    whole: fx.GraphModule
    raised: fx.GraphModule
    base: fx.GraphModule
    name: str

    @classmethod
    def of(cls, gm: fx.GraphModule) -> Stages:
        """Takes a graph apart; it is not changed."""
        from lora_fx.passes import RaiseLora, StripLora, UnfoldLora

        whole = gm
        with suppress(PassError):  # it was changed since it was folded: it is taken as it is
            whole = UnfoldLora()(gm).graph_module if origins(gm) else gm
        name = free_name(whole)
        raised = RaiseLora(name)(whole).graph_module
        return cls(gm, whole, raised, StripLora()(raised).graph_module, name)

    def standing(self) -> fx.GraphModule:
        """The graph as it is, with branches that are known as such."""
        from lora_fx.passes import RaiseLora

        return self.raised if self.whole is self.gm else RaiseLora(self.name)(self.gm).graph_module

    def bound(self, layers: BaseLayers) -> Iterator[Binding]:
        """Each adapter; what the model itself adds counts where no adapter is known to act."""
        known: set[str] = set()
        for record in injected(self.gm):
            binding = bind(layers, record.now(self.gm))
            known |= binding.updates.keys()
            yield binding
        if any(branch.name == self.name for branch in branches(self.raised)):
            own = adapter_from(self.raised, self.name)
            updates = {path: u for path, u in own.updates.items() if path not in known}
            yield bind(layers, replace(own, updates=updates))

    def mixed(self) -> set[str]:
        """The layers that fold makes more of than their adapter: W' - W is not its alone."""
        from lora_fx.passes import FoldLora

        if self.whole is self.gm:
            return set()
        edits = FoldLora(chains=True)(self.base).edits
        return {edit.path for edit in edits if edit.action == "fold"}
