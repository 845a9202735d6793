"""A GraphModule that compiles its graph when somebody first calls it or looks at its code.

A pipeline of n passes makes n graphs, of which only the last is run. torch has a lazy
GraphModule of its own, whose `forward` takes ``(*args, **kwargs)`` until then; whoever asks this
one for its signature, as torch.export does, gets the true one.
"""

from __future__ import annotations

from typing import Any

from torch import fx


class _WhenRead:
    """Stands for what `recompile` sets, and calls it when asked.

    It does not hide what recompile puts in its place: `forward` on the class, the others on the
    instance, which comes before a descriptor that cannot be set.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, gm: fx.GraphModule | None, owner: type) -> Any:
        if gm is None:
            return self
        gm.recompile()
        return getattr(gm, self._name)


def compile_when_read(gm: fx.GraphModule, graph: fx.Graph) -> None:
    """Gives a module a graph, as ``gm.graph = graph`` does, but compiles it later."""
    gm._graph = graph
    graph.owning_module = gm
    names = ["forward", "_code"]
    if isinstance(graph._codegen, fx.graph._PyTreeCodeGen):
        names += ["_in_spec", "_out_spec"]
    for name in names:
        gm.__dict__.pop(name, None)
        setattr(type(gm), name, _WhenRead(name))  # every GraphModule has a class of its own
    type(gm).__reduce__ = _reduce  # type: ignore[method-assign, assignment]


def _reduce(gm: fx.GraphModule) -> tuple[Any, ...]:
    """Compiles first: torch takes what is there before it compiles."""
    gm.recompile()
    return fx.GraphModule.__reduce__(gm)
