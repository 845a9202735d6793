"""The normal form: each layer is one aten call on ``get_attr`` weights."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lora_fx.frontend.functionalize import functionalise
from lora_fx.graph.ops import aten, call_argument, module_path
from lora_fx.layers.layer_types import spelling_of

Arguments = tuple[Any, ...]

# What torch.export notes about dtypes that it saw: true of any input that passes its guards.
_NOTES = {aten._assert_tensor_metadata.default}


def _addmm(node: fx.Node) -> Arguments | None:
    if set(node.kwargs) & {"beta", "alpha", "out"}:
        return None
    return _input(node), call_argument(node, 1, "mat1"), call_argument(node, 2, "mat2")


def _plain(node: fx.Node) -> Arguments | None:
    """Positional arguments, however they were given; None if there are others."""
    names = [n for n in ("other", "mat2") if n in node.kwargs]
    if len(names) < len(node.kwargs) or len(names) + len(node.args) != 2:
        return None
    return (*node.args, *(node.kwargs[name] for name in names))


def _baddbmm(node: fx.Node) -> Arguments | None:
    if set(node.kwargs) & {"beta", "alpha", "out"}:
        return None
    return _input(node), call_argument(node, 1, "batch1"), call_argument(node, 2, "batch2")


def _einsum(node: fx.Node) -> Arguments | None:
    if node.kwargs or not isinstance(node.args[0], str):
        return None
    rest: Any = node.args[1:]
    given = rest[0] if len(rest) == 1 and isinstance(rest[0], list | tuple) else rest
    return node.args[0], list(given)


def _tensordot(node: fx.Node) -> Arguments | None:
    dims = call_argument(node, 2, "dims", 2)
    if type(dims) is int:  # the last axes of the one, the first of the other
        dims = [list(range(-dims, 0)), list(range(dims))]
    is_static = isinstance(dims, list | tuple) and len(dims) == 2
    if not is_static or node.kwargs.get("out") is not None:
        return None
    one, two = ([axes] if type(axes) is int else axes for axes in dims)
    if not all(isinstance(axes, list | tuple) for axes in (one, two)):
        return None
    return call_argument(node, 0, "a"), call_argument(node, 1, "b"), list(one), list(two)


def _inner(node: fx.Node) -> Arguments | None:
    args = _plain(node)
    return None if args is None else (*args, [-1], [-1])


def _input(node: fx.Node) -> Any:
    return call_argument(node, 0, "input")


# Products that are written out; the functions of layers are told by `LayerType`.
_PRODUCTS: dict[Any, tuple[Any, Callable[[fx.Node], Arguments | None]]] = {
    torch.addmm: (aten.addmm.default, _addmm),
    torch.baddbmm: (aten.baddbmm.default, _baddbmm),
    operator.matmul: (aten.matmul.default, _plain),
    torch.matmul: (aten.matmul.default, _plain),
    torch.mm: (aten.mm.default, _plain),
    torch.bmm: (aten.bmm.default, _plain),
    torch.einsum: (aten.einsum.default, _einsum),
    torch.tensordot: (aten.tensordot.default, _tensordot),
    torch.inner: (aten.tensordot.default, _inner),
    aten.inner.default: (aten.tensordot.default, _inner),
}

# Methods of tensors by the function of that name.
_METHODS: dict[Any, Any] = {
    name: getattr(torch, name) for name in ("addmm", "baddbmm", "matmul", "mm", "bmm", "inner")
}


def normalise(graph: fx.Graph) -> None:
    """Rewrites a freshly traced graph, in place, to the normal form.

    Layer functions become their aten operators, torch.export's notes on dtypes go (its guards,
    which refuse other inputs than the graph is good for, stay), writes into new memory become
    values, calls and pieces that nobody reads go, casts that do nothing are read by the module that
    made them alone, and every tensor is fetched right where it is first read.
    """
    for node in list(graph.nodes):
        if node.op == "call_method" and node.target in _METHODS:
            _to_aten(_as_function(node))
        elif node.target in _NOTES:
            graph.erase_node(node)
        elif node.op == "call_function":
            _to_aten(node)
    functionalise(graph)
    for node in reversed(graph.nodes):
        if not node.users and _is_pure(node):
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.target is aten.to.dtype and _is_idle(node):
            _give_back(node)
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        _fetch_late(node, order)


def _is_pure(node: fx.Node) -> bool:
    """Whether a call does nothing but give its result, and draws no random numbers."""
    if node.op == "get_attr" or node.target is operator.getitem:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and not node.is_impure()


def _as_function(node: fx.Node) -> fx.Node:
    """``x.matmul(w)  ->  matmul(x, w)``."""
    with node.graph.inserting_before(node):
        made = node.graph.call_function(_METHODS[node.target], node.args, node.kwargs)
    made.meta.update(node.meta)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)
    return made


def _to_aten(node: fx.Node) -> None:
    if node.target in _PRODUCTS:
        target, translate = _PRODUCTS[node.target]
        arguments = translate(node)
        call = None if arguments is None else (target, arguments)
    else:
        call = spelling_of(node)
    if call is None:
        return
    node.target, node.args = call
    only = {known.name for known in call[0]._schema.arguments if known.kwarg_only}
    node.kwargs = {name: value for name, value in node.kwargs.items() if name in only}


def _is_idle(cast: fx.Node) -> bool:
    before, after = (node.meta.get("val") for node in (cast.all_input_nodes[0], cast))
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return before.dtype == after.dtype and not cast.kwargs and len(cast.args) == 2


def _give_back(cast: fx.Node) -> None:
    """Lets other modules read what was cast.

    A cast to the dtype that it has returns the very tensor it was given, and torch.export takes
    everyone who reads that tensor afterwards for a reader of the cast.
    """
    own, source = module_path(cast), cast.all_input_nodes[0]
    for user in list(cast.users):
        path = module_path(user)
        if own and path != own and not path.startswith(f"{own}.") and user.op != "output":
            user.replace_input_with(cast, source)
    if not cast.users:
        cast.graph.erase_node(cast)


def _fetch_late(node: fx.Node, order: dict[fx.Node, int]) -> None:
    if not node.users:
        node.graph.erase_node(node)
        return
    first = min(node.users, key=lambda user: order[user])
    first.prepend(node)
