"""Symbolic tracing that opens the layers an adapter can act on."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from lora_fx.called import as_called
from lora_fx.errors import TraceError
from lora_fx.graphs import targets
from lora_fx.shells import untouched
from lora_fx.trace_errors import explain_failure

# Layers whose tensors an adapter may update or replace; everything else of torch.nn stays one
# call of its module, so that dropout and batch-norm keep their training behaviour.
_OPENED = (nn.Linear, nn.Embedding, _ConvNd, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


# What the tracer calls a tensor that it meets and no module holds.
_MADE = re.compile(r"_tensor_constant\d+$")


class LayerTracer(fx.Tracer):
    """torch.fx's tracer with layers traced through, down to the functions they call."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Keeps torch.nn's modules whole, except those with a layer's weights."""
        return super().is_leaf_module(m, module_qualified_name) and not isinstance(m, _OPENED)


def symbolic_graph(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[fx.Graph, dict[str, torch.Tensor]]:
    """Traces without running: shapes stay general.

    Arguments that are not tensors in the example, and optional ones (None, True, False by
    default) that the example leaves out, are fixed to their value: control flow may hang on them.

    Returns:
        The graph, and the tensors that the model's own code makes of nothing, by name.

    Raises:
        TraceError: the model's control flow depends on data, or it is not traceable otherwise.
    """
    fixed = _fixed(model, args, kwargs)
    root = as_called(model, kwargs)
    try:
        with untouched(model), untouched(root), _no_autocast():
            graph = LayerTracer().trace(root, concrete_args=fixed)
            made = {name: getattr(root, name) for name in targets(graph) if _MADE.match(name)}
    except Exception as error:  # the model's own code runs in here and may raise anything
        raise TraceError(explain_failure(model, "symbolic", error)) from error
    for node in graph.nodes:
        name = str(node.target).rpartition("_")[0]
        if node.op == "placeholder" and name in fixed:
            node.target = name  # the tracer numbers fixed arguments: twice_1
    return graph, made


@contextmanager
def _no_autocast() -> Iterator[None]:
    """Refuses what leaves no trace in a graph but changes its numbers."""
    enter: Any = torch.autocast.__enter__

    def refuse(context: torch.autocast) -> Any:
        if context._enabled:
            raise NotImplementedError("symbolic tracing does not record torch.autocast")
        return enter(context)

    torch.autocast.__enter__ = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]


def _fixed(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(model.forward)
    given = signature.bind_partial(*args, **kwargs).arguments
    fixed = {
        name: value
        for name, value in given.items()
        if value is None or isinstance(value, bool | int | float | str)
    }
    for name, parameter in signature.parameters.items():
        if name not in given and any(parameter.default is v for v in (None, True, False)):
            fixed[name] = parameter.default
    return {n: v for n, v in fixed.items() if not torch.is_tensor(v)}
