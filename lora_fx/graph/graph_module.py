"""GraphModules and modules: copies that share every tensor, and attributes by dotted name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from operator import attrgetter
from types import MethodType
from typing import Any

import torch
from torch import fx, nn

from lora_fx.errors import PassError
from lora_fx.graph.lazy_compile import compile_when_read, compiled_when_read
from lora_fx.graph.lazy_tensor import LazyTensor, get_all_unevaluated, get_unevaluated, set_lazy
from lora_fx.graph.ops import GUARDS
from lora_fx.graph.train_eval import TracedGraph

_TRIES = 10_000  # numbers behind a name until it is given up


def shallow_clone(module: nn.Module) -> nn.Module:
    """Copies the tree of modules and shares every tensor.

    Training mode and tensor attributes of the copy can be set without the original noticing. A
    module that the tree holds under two names becomes two modules, so that each call can be told
    by the name it was made under.
    """
    clone: nn.Module = module.__new__(type(module))
    clone.__dict__ = dict(module.__dict__)
    for store in ("_parameters", "_buffers"):
        clone.__dict__[store] = module.__dict__[store].copy()
    clone.__dict__["_modules"] = {
        name: child if child is None else shallow_clone(child)
        for name, child in module._modules.items()
    }
    if "forward" in clone.__dict__:
        clone.__dict__["forward"] = _moved(clone.__dict__["forward"], module, clone)
    return clone


def _moved(forward: Any, module: nn.Module, clone: nn.Module) -> Any:
    """A ``forward`` that somebody bound to a module, bound to its clone."""
    if isinstance(forward, MethodType) and forward.__self__ is module:
        return MethodType(forward.__func__, clone)
    if isinstance(forward, partial):
        given = [clone if value is module else value for value in forward.args]
        return partial(_moved(forward.func, module, clone), *given, **forward.keywords)
    return forward


def split_shared_modules(model: nn.Module) -> nn.Module:
    """The model itself, or a shell of it if some module has two names in it."""
    once = sum(1 for _ in model.modules())
    named = sum(1 for _ in model.named_modules(remove_duplicate=False))
    return model if once == named else shallow_clone(model)


def frozen(module: nn.Module) -> nn.Module:
    """A shell whose parameters share memory with the original's and take no gradient.

    Buffers are copies: batch-norm writes its statistics into them in training.
    """
    clone = shallow_clone(module)
    for child in clone.modules():
        for name, buffer in child._buffers.items():
            child._buffers[name] = None if buffer is None else buffer.clone()
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(parameter.detach(), requires_grad=False)
    return clone


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
    read, given = targets(graph), more or {}
    held = {**get_all_unevaluated(root, read.keys() - given.keys()), **given}
    for target, op in read.items():
        assign(gm, target, shallow_clone(held[target]) if op == "call_module" else held[target])
    compile_when_read(gm, graph)
    return gm


def attribute(root: nn.Module, target: str) -> Any:
    """Looks up a dotted name."""
    return attrgetter(target)(root)


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


class Store:
    """Keeps new values in a graph module under the names that are wished for.

    What is called ``name`` by somebody else is called ``name_1`` and so on, until `settle` grants
    the names that came free meanwhile.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._wishes: dict[str, str] = {}
        self._again: dict[str, str] = {}
        self._constants: dict[str, list[tuple[str, torch.Tensor | LazyTensor]]] = defaultdict(list)

    def keep(self, name: str, value: Any) -> str:
        """Keeps a value, and gives the name that it has for now."""
        candidate, number = name, 0
        while not is_free(self._gm, candidate):
            if number > _TRIES:
                raise PassError(f"{name} lies below a tensor of the model: no name like it is free")
            number += 1
            candidate = f"{name}_{number}"
        assign(self._gm, candidate, value)
        if candidate != name:
            self._wishes[candidate] = name
        return candidate

    def constant(self, name: str, value: torch.Tensor | LazyTensor) -> str:
        """Keeps a tensor; an equal one of the same name is kept once."""
        for target, known in self._constants[name]:
            if _equal(known, value):
                return target
        target = self.keep(name, value)
        self._constants[name].append((target, value))
        return target

    def shared(self, name: str, value: Any) -> str:
        """Keeps a value that several nodes of another graph fetch under one name: once."""
        if not is_free(self._gm, name) and get_unevaluated(self._gm, name) is value:
            return name
        if name not in self._again:
            kept = shallow_clone(value) if isinstance(value, nn.Module) else value
            self._again[name] = self.keep(name, kept)
        return self._again[name]

    def settle(self) -> dict[str, str]:
        """Grants the names that are free by now: what a value was called -> what it is."""
        granted = {}
        for old, new in self._wishes.items():
            if is_free(self._gm, new):
                assign(self._gm, new, get_unevaluated(self._gm, old))
                remove(self._gm, old)
                granted[old] = new
        return granted


def _equal(one: torch.Tensor | LazyTensor, other: torch.Tensor | LazyTensor) -> bool:
    if isinstance(one, LazyTensor) or isinstance(other, LazyTensor):
        return isinstance(one, LazyTensor) and one.equals(other)
    return torch.equal(one, other)
