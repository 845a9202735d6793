"""Training and eval mode of a graph: recorded flags follow ``.train()`` and ``.eval()``.

A tracer records the mode that a model is in: ``dropout(x, 0.1, False)``. To follow, the model is
traced again in the other mode, once, when somebody first asks for it; where the two graphs differ
in numbers alone, such as flags and probabilities, the numbers are exchanged. A model that takes
another way in the other mode is refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from lora_fx.graph.alignment import arguments, put_argument
from lora_fx.graph.lazy_compile import compile_when_read
from lora_fx.graph.retracing import KEY, source_of
from lora_fx.graph.training_flags import refuse_flags


class TracedGraph(fx.GraphModule):
    """A GraphModule whose recorded flags follow its mode."""

    def train(self, mode: bool = True) -> TracedGraph:
        """Sets the mode of every module, and of what the graph has recorded.

        Raises:
            TraceError: the graph cannot follow; names the modules, and says what to do.
        """
        follow(self, mode)
        super().train(mode)
        source = source_of(self)
        own = source.modes_in(mode) if source is not None else {}
        for path, module in self.named_modules():
            module.training = own.get(path, mode)
        return self


@contextmanager
def in_mode(model: nn.Module, mode: bool) -> Iterator[dict[str, bool]]:
    """A model in one mode, and the mode that each module then has.

    A ``train`` of its own, which may do anything to weights, is asked on a copy.
    """
    modules = dict(model.named_modules())
    wanted = dict.fromkeys(modules, mode)
    own = any(type(m).train not in (nn.Module.train, TracedGraph.train) for m in modules.values())
    if own:
        probe = copy.deepcopy(model).train(mode)
        wanted = {path: module.training for path, module in probe.named_modules()}
    graph = model if isinstance(model, TracedGraph) else None
    before = {path: module.training for path, module in modules.items()}
    if graph is not None:
        follow(graph, mode)
    try:
        for path, module in modules.items():
            module.training = wanted[path]
        yield wanted
    finally:
        for path, module in modules.items():
            module.training = before[path]
        if graph is not None:
            follow(graph, before[""])


def follow(gm: fx.GraphModule, mode: bool) -> None:
    """Switches what a graph has recorded of a mode, in place.

    Raises:
        TraceError: it cannot be switched.
    """
    source = source_of(gm)
    if source is None:
        refuse_flags(gm, mode)
        return
    numbers = source.numbers(mode)
    changed = [_set(n, numbers[n.meta[KEY]]) for n in gm.graph.nodes if n.meta.get(KEY) in numbers]
    if any(changed):
        compile_when_read(gm, gm.graph)


def _set(node: fx.Node, values: dict[int | str, Any]) -> bool:
    held = arguments(node)
    changed = {place: value for place, value in values.items() if held[place] != value}
    for place, value in changed.items():
        put_argument(node, place, value)
    return bool(changed)
