"""Values that something writes into: their node does not say what they hold."""

from __future__ import annotations

from torch import fx

from lora_fx.ops import op_name, written_argument

# Operators whose result is new memory: writing into it leaves the arguments alone, and the
# other way round. Anything else may be a view.
FRESH = {
    *("linear", "addmm", "matmul", "mm", "bmm", "embedding", "conv1d", "conv2d", "conv3d"),
    *("add", "sub", "mul", "div", "truediv", "neg", "clone", "layer_norm", "softmax", "gelu"),
    *("new_zeros", "zeros", "zeros_like", "relu", "tanh", "sigmoid", "silu", "cat", "index_put"),
    *("ones", "eye", "full", "repeat", "lift_fresh_copy", "slice_scatter", "select_scatter"),
}


def written(graph: fx.Graph) -> set[fx.Node]:
    """Every node whose memory, or memory it may share, is written to by a call of the graph."""
    dirty: set[fx.Node] = set()
    for node in graph.nodes:
        if written_argument(node) is not None:
            dirty |= _roots(node)
    if dirty:
        for node in graph.nodes:
            if op_name(node) not in FRESH and any(n in dirty for n in node.all_input_nodes):
                dirty.add(node)
    return dirty


def _roots(call: fx.Node) -> set[fx.Node]:
    found = {call}
    pending = [call]
    while pending:
        node = pending.pop()
        if node is not call and op_name(node) in FRESH:
            continue
        sources = [written_argument(call)] if node is call else node.all_input_nodes[:1]
        fresh = [n for n in sources if isinstance(n, fx.Node) and n not in found]
        found.update(fresh)
        pending.extend(fresh)
    return found
