"""Graphs of PEFT's layers: of those that differ in their tensors alone, one is traced."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from lora_fx.frontend.trace import trace
from lora_fx.graph.graph_module import attribute, build_graph_module, copy_graph, targets
from lora_fx.traced_adapters.dense_sparse import sparse_said_densely
from lora_fx.traced_adapters.value_branches import branches_taken


@dataclass(frozen=True)
class Traces:
    """What was traced of the layers of one adapter.

    Attributes:
        known: how a layer is made, and its tensors' sizes -> its graph, and which of the tensors
            in that are the layer's own, not computed from numbers that it holds besides.
    """

    known: dict[Any, tuple[fx.GraphModule, list[str]]] = field(default_factory=dict)

    def of(self, layer: nn.Module, x: torch.Tensor) -> fx.GraphModule:
        """The graph of a layer.

        Another's is taken if it gives the same for x, to the bit, with this one's tensors in it:
        then scales and choices that a trace holds fixed are this layer's too. An x of numbers
        reaches all of them; ids pick rows, so tables are each traced.

        Raises:
            AdapterError: a branch of the layer depends on its input.
        """
        held = dict(layer.named_parameters(remove_duplicate=False)) | dict(layer.named_buffers())
        make = repr(layer), *((name, t.shape, t.dtype) for name, t in held.items())
        if make in self.known and x.is_floating_point():
            graph_module, own = self.known[make]
            graph, given = copy_graph(graph_module.graph), {name: held[name] for name in own}
            made = build_graph_module(graph_module, graph, False, given)
            if torch.equal(made(x), layer(x)):
                return made
        with branches_taken(layer, x), sparse_said_densely():
            gm = trace(layer, (x,))
        own = [
            name
            for name in targets(gm.graph)
            if name in held and attribute(gm, name).data_ptr() == held[name].data_ptr()
        ]
        self.known[make] = gm, own
        return gm
