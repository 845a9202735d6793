"""Copies of a GraphModule that share its tensors, and its attributes by dotted name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from lora_fx.graph.lazy_compile import compile_when_read, compiled_when_read
from lora_fx.graph.lazy_tensor import LazyTensor, get_unevaluated, set_lazy
from lora_fx.graph.module_copy import shallow_clone
from lora_fx.graph.ops import GUARDS
from lora_fx.graph.train_eval import TracedGraph


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """Copies a graph, node names, meta and calling convention included."""
    copy = fx.Graph(tracer_cls=graph._tracer_cls)
    nodes: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        # Arguments are set afterwards: create_node walks them as a pytree, which doubles its time.
        twin = copy.create_node(node.op, node.target, name=node.name, type_expr=node.type)
        twin.args = fx.node.map_arg(node.args, nodes.__getitem__)
        if node.kwargs:
            twin.kwargs = fx.node.map_arg(node.kwargs, nodes.__getitem__)
        twin.meta.update(node.meta)
        nodes[node] = twin
    copy._codegen = graph._codegen
    return copy


def without_guards(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that takes any input: torch.export finds its guards anew."""
    graph = copy_graph(gm.graph)
    for node in graph.nodes:
        if node.target == GUARDS:
            graph.erase_node(node)
    return build_graph_module(gm, graph, gm.training)


def targets(graph: fx.Graph) -> dict[str, str]:
    """What a graph reads from its module: the dotted name and the kind of node."""
    return {str(n.target): n.op for n in graph.nodes if n.op in ("get_attr", "call_module")}


def build_graph_module(
    root: nn.Module,
    graph: fx.Graph,
    training: bool,
    more: Mapping[str, torch.Tensor] | None = None,
) -> fx.GraphModule:
    """A GraphModule that holds just what the graph reads from ``root``; it compiles when read.

    What the root does not hold is in ``more``. Tensors are the same objects; called modules become
    shells, so that training mode can be set on the result alone.
    """
    with compiled_when_read():
        gm = TracedGraph({}, fx.Graph())
    gm.training = training
    for target, op in targets(graph).items():
        value: Any = more[target] if more and target in more else get_unevaluated(root, target)
        assign(gm, target, shallow_clone(value) if op == "call_module" else value)
    compile_when_read(gm, graph)
    return gm


def attribute(root: nn.Module, target: str) -> Any:
    """Looks up a dotted name."""
    value: Any = root
    for name in target.split("."):
        value = getattr(value, name)
    return value


def assign(gm: fx.GraphModule, target: str, value: Any) -> None:
    """Sets a dotted name: modules and parameters as they are, other tensors as buffers.

    A `LazyTensor` is a parameter that is computed when it is read.
    """
    *path, name = target.split(".")
    holder: nn.Module = gm
    for step in path:
        if not hasattr(holder, step):
            container = nn.Module()
            container.training = gm.training
            holder.add_module(step, container)
        holder = getattr(holder, step)
    if isinstance(value, LazyTensor):
        set_lazy(holder, name, value)
    elif isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        holder.register_buffer(name, value)
    else:
        setattr(holder, name, value)


def remove(gm: fx.GraphModule, target: str) -> None:
    """Drops a dotted name."""
    path, _, name = target.rpartition(".")
    delattr(gm.get_submodule(path), name)


def is_free(gm: fx.GraphModule, target: str) -> bool:
    """Whether a dotted name can be assigned without hiding, or hiding under, another."""
    holder: Any = gm
    for name in target.split("."):
        if not isinstance(holder, nn.Module):
            return False
        if name in holder._parameters:
            return False
        if not hasattr(holder, name):
            return True
        holder = getattr(holder, name)
    return False
