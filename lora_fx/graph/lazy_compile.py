"""A GraphModule that compiles its graph when somebody first calls it or looks at its code.

A pipeline of n passes makes n graphs, of which only the last is run. torch has a lazy
GraphModule of its own, whose `forward` takes ``(*args, **kwargs)`` until then; whoever asks this
one for its signature, as torch.export does, gets the true one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx

from lora_fx.errors import TraceError
from lora_fx.graph.ops import GUARDS

_recompile = fx.GraphModule.recompile


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
        _recompile(gm)
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


@contextmanager
def compiled_when_read() -> Iterator[None]:
    """Lets torch make graphs that are compiled later: it compiles most of them for nobody."""
    before = fx.GraphModule.recompile
    setattr(fx.GraphModule, "recompile", lambda gm: compile_when_read(gm, gm._graph))  # noqa: B010
    try:
        yield
    finally:
        setattr(fx.GraphModule, "recompile", before)  # noqa: B010


def _reduce(gm: fx.GraphModule) -> tuple[Any, ...]:
    """Compiles first: torch takes what is there before it compiles.

    Raises:
        TraceError: the graph has guards of torch.export's, which are code of no module.
    """
    if GUARDS in gm._modules:
        raise TraceError(
            "a graph of torch.export checks its inputs by code that cannot be pickled: save the "
            "model and the adapter (lora_fx.save_adapter), and trace again; or trace with "
            "frontend='symbolic'"
        )
    _recompile(gm)
    rebuild, given = fx.GraphModule.__reduce__(gm)
    return _rebuilt, (_own_class(gm), rebuild, given)


def _own_class(gm: fx.GraphModule) -> type[fx.GraphModule]:
    """The class that a module was made as: torch derives one more for each object."""
    return next(
        c for c in type(gm).__mro__ if c.__name__ != type(gm).__name__ or c is fx.GraphModule
    )


def _rebuilt(
    own: type[fx.GraphModule], rebuild: Callable[..., fx.GraphModule], given: tuple[Any, ...]
) -> fx.GraphModule:
    """Gives back the class that torch's pickles forget."""
    plain = rebuild(*given)
    gm = own.__new__(own)
    gm.__dict__.update(plain.__dict__)
    gm.graph = plain.graph
    return gm
