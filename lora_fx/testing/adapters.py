"""An adapter of any kind for any layer, and what an adapter must do to a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import GraphAppendingTracer

from lora_fx.adapters.adapter import Adapter, AnyUpdate, Update, WeightUpdate
from lora_fx.algebra.evaluate import recorded
from lora_fx.api import fold, inject
from lora_fx.frontend.trace import trace
from lora_fx.testing.judge import distance, relative
from lora_fx.testing.updates import update_of


def make_adapter(
    shapes: Mapping[str, tuple[int, ...]],
    rank: int = 2,
    scale: float = 1.5,
    name: str = "french",
    kind: str = "lora",
) -> Adapter:
    """An adapter with effect, of random numbers, other ones for another rank.

    Args:
        shapes: path -> shape of the layer's weight, (out, in), or with a kernel behind them.
        rank: of each layer; kinds other than ``"lora"`` have a rank of their own, mostly 2.
        scale: of each layer, for ``"lora"`` alone.
        name: of the adapter.
        kind: a key of `UPDATES`.
    """
    if kind != "lora":
        return Adapter(name, {path: update_of(kind, shape) for path, shape in shapes.items()})
    make = torch.Generator().manual_seed(rank)
    updates = {
        path: Update(
            torch.randn(rank, *into, generator=make), torch.randn(out, rank, generator=make), scale
        )
        for path, (out, *into) in shapes.items()
    }
    return Adapter(name, updates)


def fits(adapter: Adapter, base: nn.Module, x: torch.Tensor, expected: torch.Tensor) -> None:
    """Asserts that a base with an adapter of factors computes what its owner does.

    Injected and folded agree to 1e-5, and the scale matters: 10 % more is 1e-3 off, the base 1e-2.

    Args:
        adapter: for the base.
        base: the model, or its graph.
        x: its only input.
        expected: what the owner of the adapter computes.

    Raises:
        AssertionError: one of these does not hold.
    """
    gm = base if isinstance(base, fx.GraphModule) else trace(base.eval(), (x,))
    updates: Any = adapter.updates
    louder = {path: replace(u, scale=1.1 * u.scale) for path, u in updates.items()}
    off = Adapter(adapter.name, louder, adapter.replacements)
    injected = inject(gm, adapter)
    with torch.no_grad():
        assert relative(injected(x), expected) <= 1e-5
        assert relative(fold(injected)(x), expected) <= 1e-5
        assert relative(inject(gm, off)(x), expected) > 1e-3
        assert relative(gm(x), expected) > 1e-2


def means(
    update: AnyUpdate,
    base: torch.Tensor,
    expected: torch.Tensor,
    *controls: torch.Tensor,
    within: float = 1e-6,
) -> None:
    """Asserts what an update does to a weight; of a `WeightUpdate`, that a graph agrees bitwise.

    Args:
        update: what is tried.
        base: W, (out, in, *kernel).
        expected: W'.
        *controls: what W' must not be; nor must it be W.
        within: the relative error that is allowed.

    Raises:
        AssertionError: W' is not what is expected, or is a control.
    """
    actual = update.weight(base)
    assert distance(actual, expected) <= within
    assert all(distance(actual, control) > 1e-2 for control in (base, *controls))
    if update.makes_anew:
        values = [v.to(actual.dtype) if v.is_floating_point() else v for v in update.values]
        known: Any = replace(update, shape=tuple(base.shape))
        again = recorded_graph(known)(base.to(actual.dtype), *values)
        assert torch.equal(again, actual)


def recorded_graph(update: WeightUpdate) -> fx.GraphModule:
    """W' as a graph has it, W of the update's shape: of W and the values, a call an operator."""
    graph = fx.Graph()
    tracer = GraphAppendingTracer(graph)
    names = ["weight", *(f"value_{place}" for place in range(len(update.values)))]
    shape = tuple(size or 0 for size in update.shape)
    function = recorded(update.of, shape, update.leaves)
    result: Any = function(*(fx.Proxy(graph.placeholder(name), tracer) for name in names))
    graph.output(result.node)
    graph.lint()
    assert {n.op for n in graph.nodes} == {"placeholder", "call_function", "output"}
    calls = [n for n in graph.nodes if n.op == "call_function"]
    assert all(isinstance(n.target, torch._ops.OpOverload) for n in calls)
    return fx.GraphModule({}, graph)
