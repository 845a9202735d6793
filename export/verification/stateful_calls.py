"""What a file cannot hold: state that a call leaves behind, and random numbers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from lora_fx.errors import ExportError, shorten
from lora_fx.graph.aliasing import Written
from lora_fx.graph.lazy_tensor import get_unevaluated
from lora_fx.graph.ops import call_argument, draws, module_path, op_name
from lora_fx.graph.retracing import source_of
from lora_fx.graph.train_eval import EVAL_FLAGS, flags

# What a table with max_norm writes is the same again when it is written again.
_SAME_AGAIN = {"embedding", "embedding_bag", "embedding_renorm_"}
_OVERWRITES = {"copy_", "fill_", "zero_"}
# The same as values: of what they are given first, they take the shape.
_SHAPED_LIKE = {name.rstrip("_") for name in _OVERWRITES}


def refuse_unsteady(gm: fx.GraphModule) -> None:
    """Refuses a graph whose later calls give something else than its first.

    Args:
        gm: in eval mode.

    Raises:
        ExportError: names the module or the buffer.
    """
    source = source_of(gm)
    reasons = [source.unsteady_in_eval()] if source is not None else []
    writes = Written(gm.graph)
    read = writes.needed()
    reasons += [f"{place} draws random numbers in eval mode" for place in _random(read)]
    remembered = sorted(_remembered(gm, writes, read))
    if remembered:
        reasons.append(
            f"a call changes {shorten(remembered)}, and the next call reads what it left there"
        )
    found = next((reason for reason in reasons if reason), None)
    if found is not None:
        raise ExportError(
            f"{found}: an ONNX file gives the same output at every call. Make it an input and an "
            "output of the model, or a constant"
        )


def _remembered(gm: fx.GraphModule, writes: Written, read: set[fx.Node]) -> Iterator[str]:
    """Stored tensors that are written to, and read before anything overwrites them whole."""
    fetched = gm.graph.find_nodes(op="get_attr")
    values = {node: get_unevaluated(gm, str(node.target)) for node in fetched}
    dirty = {id(values[node]) for node in writes.nodes if node.op == "get_attr"}
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    for tensor in dirty:
        names = [node for node in fetched if id(values[node]) == tensor]
        users = {user for node in names for user in node.users if not _takes_shape(user, node)}
        first = min(users, key=order.__getitem__)
        overwritten = op_name(first) in _OVERWRITES and first.args[0] in names
        writers = {op_name(write) for node in names for write in writes.calls.get(node, ())}
        steady = overwritten or (bool(writers) and writers <= _SAME_AGAIN)
        if not steady and any(node in read for node in names):
            yield str(names[0].target)


def _takes_shape(user: fx.Node, node: fx.Node) -> bool:
    return op_name(user) in _SHAPED_LIKE and user.args[0] is node and node not in user.args[1:]


def _random(read: set[fx.Node]) -> Iterator[str]:
    for node in read:
        if node.op in ("call_function", "call_method") and _draws(node):
            yield f"{module_path(node) or 'the model itself'} ({op_name(node)})"


def _draws(node: fx.Node) -> bool:
    if not draws(node):
        return False
    switches = {name: call_argument(node, *at) for name, at in flags(node).items()}
    return not switches or any(value != EVAL_FLAGS[name] for name, value in switches.items())
