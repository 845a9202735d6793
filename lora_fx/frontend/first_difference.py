"""The first module whose output differs, or that draws random numbers, found by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils import _pytree as pytree

from lora_fx.frontend.isolated_run import seed
from lora_fx.graph.graph_module import build_graph_module, copy_graph
from lora_fx.graph.lazy_compile import compile_when_read

_ITSELF = "the model itself"


def first_that_differs(
    model: nn.Module, gm: fx.GraphModule, call: Callable[[nn.Module], Any]
) -> str:
    """The path of the first module to return a tensor that no node of its graph has.

    Args:
        model: the model.
        gm: its graph.
        call: runs either.
    """
    seen: set[Any] = set()
    call(_noting(gm, seen))
    entered = {path for node in gm.graph.nodes for path in _paths(node)}
    found: list[str] = []

    def look(path: str, output: Any) -> None:
        tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
        if path in entered and any(_digest(t) not in seen for t in tensors):
            found.append(path)

    with _watched(model, look):
        call(model)
    return _named(found)


def first_that_draws(model: nn.Module, call: Callable[[nn.Module], Any]) -> str:
    """The path of the first module that draws from Python's or numpy's random numbers.

    Args:
        model: the model.
        call: runs it, from the state that `seed` sets.
    """
    drawn, found = seed(), list[str]()
    running = [""]

    def enter(path: str) -> None:
        if not found and drawn():
            found.append(running[-1])
        running.append(path)

    def leave(path: str, _: Any) -> None:
        running.pop()
        if not found and drawn():
            found.append(path)

    with _watched(model, leave, enter):
        call(model)
    return _named(found)


def _named(found: list[str]) -> str:
    return (found[0] if found else "") or _ITSELF


@contextmanager
def _watched(
    model: nn.Module,
    leave: Callable[[str, Any], None],
    enter: Callable[[str], None] = lambda path: None,
) -> Iterator[None]:
    """Tells of each module of a model when it is called, and its output when it returns."""
    paths = {id(module): path for path, module in model.named_modules()}

    def before(module: nn.Module, _: Any) -> None:
        if id(module) in paths:
            enter(paths[id(module)])

    def after(module: nn.Module, _: Any, output: Any) -> None:
        if id(module) in paths:
            leave(paths[id(module)], output)

    hooks = register_module_forward_pre_hook(before), register_module_forward_hook(after)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Note(nn.Module):
    """Remembers every tensor that it is shown."""

    def __init__(self, seen: set[Any]) -> None:
        super().__init__()
        self.add = seen.update  # the set itself would be put back with all that a model holds

    def forward(self, value: Any) -> None:
        tensors = [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
        self.add(map(_digest, tensors))


def _noting(gm: fx.GraphModule, seen: set[Any]) -> fx.GraphModule:
    """A copy of a graph that shows each of its values to a note."""
    graph = copy_graph(gm.graph)
    copy = build_graph_module(gm, graph, gm.training)
    copy.add_module("_note", _Note(seen))
    for node in list(graph.nodes):
        if node.op in ("call_function", "call_method", "call_module", "get_attr"):
            with graph.inserting_after(node):
                graph.call_module("_note", (node,))
    compile_when_read(copy, graph)
    return copy


def _paths(node: fx.Node) -> Iterator[str]:
    """The modules that a node was made in, from the outermost on."""
    yield ""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        yield str(path)


def _digest(tensor: torch.Tensor) -> Any:
    value = tensor.detach().to_dense().cpu().resolve_conj().resolve_neg().contiguous()
    held = value.reshape(-1).view(torch.uint8).numpy()  # bytes(tensor) asks it for each number
    return tensor.dtype, tuple(tensor.shape), hash(held.tobytes())
