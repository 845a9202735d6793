"""Blocks that torch.export keeps as calls of graphs of their own: ``with torch.no_grad():``."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn

from lora_fx.graph.graph_module import copy_graph
from lora_fx.graph.ops import AUTOCAST, GRAD_MODE


def open_blocks(root: nn.Module, graph: fx.Graph) -> None:
    """``wrap(False, block, x, W)  ->  linear(x, W)``: what runs in a block is seen as the rest is.

    Without gradients, or with autocast off, the numbers are the same. Autocast that is on changes
    them, and stays a block.

    Args:
        root: holds the blocks.
        graph: of it, changed in place.
    """
    for node in list(graph.nodes):
        found = _block(root, node)
        if found is None:
            continue
        block, operands = found
        inner = copy_graph(block.graph)
        open_blocks(block, inner)
        if not any(n.op in ("get_attr", "call_module") for n in inner.nodes):
            _put(graph, node, inner, operands)


def _block(root: nn.Module, node: fx.Node) -> tuple[fx.GraphModule, Any] | None:
    """The block that a node runs, and what it is run on, if no number hangs on its being one."""
    args: Any = node.args
    if node.target is GRAD_MODE:
        _, held, *operands = args
    elif node.target is AUTOCAST and not args[2]:
        *_, held = args[:5]
        operands = args[5:]
    else:
        return None
    block = getattr(root, str(held.target), None)
    return (block, operands) if isinstance(block, fx.GraphModule) else None


def _put(graph: fx.Graph, node: fx.Node, inner: fx.Graph, operands: Any) -> None:
    places = inner.find_nodes(op="placeholder")
    known = dict(zip(places, operands, strict=True))
    with graph.inserting_before(node):
        results: Any = graph.graph_copy(inner, known)
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    held = [source for source in node.all_input_nodes if source.op == "get_attr"]
    graph.erase_node(node)
    for source in held:
        if not source.users:
            graph.erase_node(source)
