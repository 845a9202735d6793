"""Symbolic tracing that opens the layers an adapter can act on."""

from __future__ import annotations

import inspect
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from lora_fx.errors import TraceError
from lora_fx.frontend.diagnostics import explain_failure
from lora_fx.frontend.recorded_writes import (
    WritingProxy,
    copied_back,
    with_new_results,
    works_in_place,
)
from lora_fx.frontend.root_call import as_called
from lora_fx.graph.graph_module import targets
from lora_fx.graph.module_state import untouched
from lora_fx.layers.layer_types import TYPES

# Layers whose tensors an adapter may update or replace; everything else of torch.nn stays one
# call of its module, so that dropout and batch-norm keep their training behaviour.
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


# What the tracer calls a tensor that it meets and no module holds.
_MADE = re.compile(r"_tensor_constant\d+$")


class LayerTracer(fx.Tracer):
    """torch.fx's tracer with layers traced through, down to the functions they call."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Keeps torch.nn's modules whole, except those with a layer's weights."""
        opened = (*_NORMS, *(cls for layer in TYPES.values() for cls in layer.classes))
        return super().is_leaf_module(m, module_qualified_name) and not isinstance(m, opened)

    def create_arg(self, a: Any) -> Any:
        """Keeps an OrderedDict one, as torch.fx does a named tuple: it takes it for a dict."""
        if type(a) is not OrderedDict:
            return super().create_arg(a)
        return self.create_node("call_function", OrderedDict, (super().create_arg(dict(a)),), {})

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Gives values that record what is written into them."""
        return WritingProxy(node, self)


def symbolic_graph(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[fx.Graph, dict[str, Any]]:
    """Traces without running: shapes stay general.

    Arguments that are not tensors in the example, and optional ones (None, True, False by
    default) that the example leaves out, are fixed to their value: control flow may hang on them.

    Returns:
        The graph, and by name what it reads in place of what the model has: the tensors that the
        model's own code makes of nothing, and modules that work in place as ones that do not.

    Raises:
        TraceError: the model's control flow depends on data, or it is not traceable otherwise.
    """
    root = as_called(model, args, kwargs)
    fixed = _fixed(root, args, kwargs)
    try:
        with untouched(model), untouched(root), _no_autocast():
            graph = LayerTracer().trace(root, concrete_args=fixed)
            names = targets(graph)
            made: dict[str, Any] = {n: getattr(root, n) for n in names if _MADE.match(n)}
    except Exception as error:  # the model's own code runs in here and may raise anything
        raise TraceError(explain_failure(model, "symbolic", error)) from error
    for node in graph.nodes:
        name = str(node.target).rpartition("_")[0]
        if node.op == "placeholder" and name in fixed:
            node.target = name  # the tracer numbers fixed arguments: twice_1
        called = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if called is not None and works_in_place(called):
            made[str(node.target)] = with_new_results(called)
            _copy_back(node)
    graph.owning_module = model  # type: ignore[assignment]  # what its calls of modules are of
    return graph, made


def _copy_back(call: fx.Node) -> None:
    readers = list(call.users)
    with call.graph.inserting_after(call):
        copy = copied_back(call.graph, call)
    copy.meta.update(call.meta)
    for reader in readers:
        reader.replace_input_with(call, copy)


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
