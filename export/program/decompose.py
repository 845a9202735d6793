"""Brings a program to operators that have an ONNX form, node by node.

torch's own way traces the whole program twice more, to replace a handful of nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from lora_fx.errors import ExportError
from lora_fx.graph.ops import GRAD_MODE, aten

# Compositions that torch always takes apart, so that no table names them, and what does nothing
# out of training.
_COMPOSED = {
    *(aten.to, aten.numpy_T, aten.adjoint, aten.batch_norm, aten.ravel, aten.reshape_as),
    *(aten.dropout, aten.alpha_dropout, aten.feature_dropout, aten.feature_alpha_dropout),
    *(aten.movedim, aten.moveaxis, aten.swapaxes, aten.swapdims, aten.tensor_split),
}
Table = Mapping[Any, Callable[..., Any]]
_NO_TABLE: Table = MappingProxyType({})


class LoweredProgram(torch.export.ExportedProgram):
    """A program of operators that write nothing, each of which is decomposed on its own."""

    def run_decompositions(
        self, decomp_table: dict[Any, Any] | None = None, **_: Any
    ) -> torch.export.ExportedProgram:
        """Replaces what the table decomposes, in place."""
        table = decomp_table or {}
        for node in list(self.graph.nodes):
            if node.op == "call_function" and _is_composed(node.target, table):
                decompose(node, node.target, table)
        self._name_outputs()
        self.graph_module.recompile()
        return self

    def _name_outputs(self) -> None:
        """Notes which nodes the outputs are now: the signature names them."""
        outputs: Any = self.graph.output_node().args[0]
        for node, spec in zip(outputs, self.graph_signature.output_specs, strict=True):
            if isinstance(node, fx.Node):
                spec.arg.name = node.name


def inline_grad_modes(gm: fx.GraphModule, graph: fx.Graph) -> None:
    """Puts the calls made under ``torch.no_grad()`` where their block is called.

    A block with tensors of its own stays.
    """
    for node in list(graph.nodes):
        if node.target is GRAD_MODE:
            _, block, *inputs = node.args
            assert isinstance(block, fx.Node)
            inner = gm.get_submodule(str(block.target))
            if isinstance(inner, fx.GraphModule) and not inner.graph.find_nodes(op="get_attr"):
                splice(node, inner.graph, inputs)
            if not block.users:
                graph.erase_node(block)


def _is_composed(target: Any, table: Table) -> bool:
    return target in table or getattr(target, "overloadpacket", None) in _COMPOSED


def decompose(node: fx.Node, function: Any, table: Table = _NO_TABLE) -> None:
    """Puts the operators that a function calls in the place of a call that gives the same.

    Raises:
        ExportError: the function needs tensors of its own.
    """
    inputs = node.all_input_nodes

    def call(*values: Any) -> Any:
        given = dict(zip(inputs, values, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), given.__getitem__)
        return function(*args, **kwargs)

    values = [n.meta["val"] for n in inputs]
    with getattr(node.meta["val"], "fake_mode", nullcontext()):  # for those made of sizes alone
        parts = make_fx(call, decomposition_table=dict(table))(*values).graph
    if parts.find_nodes(op="get_attr"):
        raise ExportError(f"{node.name}: what it is made of holds tensors")
    splice(node, parts, inputs)


def splice(node: fx.Node, block: fx.Graph, inputs: list[Any]) -> None:
    """Puts a copy of a graph in the place of a call of it."""
    known = dict(zip(block.find_nodes(op="placeholder"), inputs, strict=True))
    for inner in block.nodes:
        if inner.op == "call_function" and inner.users:  # not an assertion
            with node.graph.inserting_before(node):
                known[inner] = node.graph.node_copy(inner, known.__getitem__)
            known[inner].meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
    result: Any = fx.node.map_arg(block.output_node().args[0], known.__getitem__)
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):  # each takes one of several results
            place: Any = user.args[1]
            user.replace_all_uses_with(result[place])
            node.graph.erase_node(user)
    node.graph.erase_node(node)
