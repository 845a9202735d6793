"""torch.fx nodes: one operator name for every spelling, module paths, sizes, what is mutated."""

from __future__ import annotations

import inspect
from collections.abc import Set
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

aten = torch.ops.aten

Sizes = tuple[Any, ...]  # of ints, and of SymInts where an axis is dynamic

# The module by which torch.export refuses inputs that its graph is not good for.
GUARDS = "_guards_fn"
HOLDER = "lora_fx.holder"  # in the meta of a call: who holds its weight, if not its own module

NAMED_CASTS = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}
AUTOCAST = torch.ops.higher_order.wrap_with_autocast
GRAD_MODE = torch.ops.higher_order.wrap_with_set_grad_enabled
CASTS = {"to", "_to_copy", "type_as", *NAMED_CASTS}


def op_name(node: fx.Node) -> str:
    """Names the operator of a node: ``matmul`` for torch's, aten's, Tensor's and Python's.

    Calls of modules give the class's name in lower case, other nodes their ``op``.
    """
    if node.op == "call_module":
        return _module_class(node).lower()
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return node.op
    return function_name(node.target)


def function_name(target: Any) -> str:
    """Names a function: ``aten.add.Tensor``, ``operator.add`` and ``torch.add`` are ``add``.

    Somebody's own operator keeps its library: ``mylib::add`` may be anything.
    """
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name).removeprefix("aten::")
    name = getattr(target, "__name__", str(target))
    return str(name)


def module_path(node: fx.Node) -> str:
    """The dotted path of the module whose ``forward`` made this node; ``""`` is the root."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    return str(path)


def holder_path(node: fx.Node) -> str:
    """The path of the module that holds the weight of a layer's call: whose forward made it."""
    return str(node.meta.get(HOLDER, module_path(node)))


def is_around(node: fx.Node, layer: fx.Node) -> bool:
    """Whether the module that made a call is a layer's own or holds it: a norm does not."""
    path, inner = module_path(node), module_path(layer)
    return path in ("", inner) or inner.startswith(f"{path}.")


def call_argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Reads an argument of a call, whether it was given by place or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


_IN_PLACE = {
    *("setitem", "iadd", "isub", "imul", "itruediv", "imatmul", "ifloordiv", "imod", "ipow"),
    *("iand", "ior", "ixor"),
}


def mutates(node: fx.Node) -> bool:
    """Whether the call writes into its first argument."""
    if in_place(node) or node.kwargs.get("out") is not None:
        return True
    if node.op == "call_module":
        module = node.graph.owning_module
        called = module.get_submodule(str(node.target)) if module is not None else None
        return bool(getattr(called, "inplace", False))
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if node.op == "call_function":
        name = function_name(node.target)
        return name in _IN_PLACE or _is_in_place_name(name)
    return node.op == "call_method" and _is_in_place_name(str(node.target))


def draws(node: fx.Node) -> bool:
    """Whether a call is of an operator that draws random numbers, in whatever spelling."""
    return _draws(op_name(node).rpartition("::")[2])


@cache
def _draws(own: str) -> bool:
    packets = (getattr(aten, name, None) for name in (own, own.rstrip("_")))
    found = [p for p in packets if isinstance(p, torch._ops.OpOverloadPacket)]
    overloads = ((packet, name) for packet in found for name in packet.overloads())  # type: ignore[no-untyped-call]
    tags = [getattr(packet, name).tags for packet, name in overloads]
    return any(torch.Tag.nondeterministic_seeded in each for each in tags)


def is_nested(node: fx.Node) -> bool:
    """Whether a call is of a transform of torch.func: its value means nothing outside of that."""
    return getattr(node.target, "__module__", None) == "torch._functorch.predispatch"


def in_place(node: fx.Node) -> bool:
    """Whether a function is told to write into what it reads: ``F.relu(x, inplace=True)``."""
    place = inplace_place(node.target) if node.op == "call_function" else None
    by_place = place is not None and node.args[place : place + 1] == (True,)
    return bool(node.kwargs.get("inplace")) or by_place


@cache
def inplace_place(target: Any) -> int | None:
    """Where a function of Python takes ``inplace``, or None."""
    if not inspect.isfunction(target):
        return None
    names = list(inspect.signature(target).parameters)
    return names.index("inplace") if "inplace" in names else None


def written_arguments(node: fx.Node) -> list[fx.Node]:
    """The nodes whose memory a call writes into."""
    if isinstance(node.target, torch._ops.OpOverload):
        found = [call_argument(node, *each) for each in _written_places(node.target)]
        if node.target is aten.batch_norm.default and node.args[5]:  # the schema keeps it secret
            found += node.args[3:5]
    elif isinstance(node.target, torch._ops.HigherOrderOperator):
        inner = (n for block in blocks_of(node) for n in block.nodes)
        found = list(node.args) if any(map(written_arguments, inner)) else []
    elif "embedding" in op_name(node) and node.kwargs.get("max_norm") is not None:
        found = [call_argument(node, 1, "weight")]  # renormalised in place
    elif not mutates(node):
        return []
    else:
        out = node.kwargs.get("out")
        found = [out if out is not None else call_argument(node, 0, "input")]
    flat = pytree.tree_leaves(found, is_leaf=lambda leaf: isinstance(leaf, fx.Node))
    return [leaf for leaf in flat if isinstance(leaf, fx.Node)]


@cache
def _written_places(target: torch._ops.OpOverload) -> list[tuple[int, str]]:
    named = enumerate(target._schema.arguments)
    return [(i, a.name) for i, a in named if a.alias_info is not None and a.alias_info.is_write]


def blocks_of(node: fx.Node) -> list[fx.Graph]:
    """The graphs that a call runs, such as what is traced under ``torch.autocast``."""
    root = node.graph.owning_module
    if root is None or not isinstance(node.target, torch._ops.HigherOrderOperator):
        return []
    fetched = [n for n in node.all_input_nodes if n.op == "get_attr"]
    held = [attrgetter(str(n.target))(root) for n in fetched]
    return [block.graph for block in held if isinstance(block, fx.GraphModule)]


def _is_in_place_name(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"


def _module_class(node: fx.Node) -> str:
    module = node.graph.owning_module
    if module is None:
        return "module"
    return type(module.get_submodule(str(node.target))).__name__


_SIZES = {"size", "sym_size", "dim", "numel", "stride"}
FACTS = {"shape", "ndim", "dtype", "device", "layout"}  # attributes of a tensor, no memory


def asks_sizes(node: fx.Node) -> bool:
    """Whether a call asks for no number of what it reads."""
    name = op_name(node)
    return name in _SIZES or (name == "getattr" and node.args[1] in FACTS)


def reached(graph: fx.Graph) -> list[fx.Node]:
    """What the numbers of an output hang on, or those of what is written to, in order."""
    pending = [node for node in graph.nodes if node.op == "output" or written_arguments(node)]
    found = set(pending)
    while pending:
        node = pending.pop()
        fresh = set() if asks_sizes(node) else set(node.all_input_nodes) - found
        found |= fresh
        pending += fresh
    return sorted(found)


def needed(node: fx.Node, known: Set[fx.Node] = frozenset()) -> list[fx.Node]:
    """What a node is computed from, but for what is known, and itself, in the order of the graph.

    A run may be long: no call of this calls another.
    """
    found, pending = {node}, [node]
    while pending:
        fresh = set(pending.pop().all_input_nodes) - known - found
        found |= fresh
        pending += fresh
    return sorted(found)


def same_sizes(one: Sizes | None, other: Sizes | None) -> bool:
    """Whether sizes are equal whatever the inputs are; unknown ones are those of one source."""
    if one is None or other is None:
        return one is other
    return len(one) == len(other) and all(map(_same, one, other))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.SymInt) and isinstance(other, torch.SymInt):
        return bool(one.node.expr == other.node.expr)
    return type(one) is type(other) and bool(one == other)


def sizes_of(node: Any) -> Sizes | None:
    """The sizes that a node was traced with, or None."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None
