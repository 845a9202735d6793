"""Node-by-node alignment of two graphs of one model: they differ in numbers alone, or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lora_fx.errors import TraceError
from lora_fx.graph.ops import GUARDS, aten, blocks_of, module_path

Places = dict[int | str, Any]
Numbers = dict[str, Places]


def differing_numbers(one: fx.Graph, other: fx.Graph, key: str) -> Numbers:
    """What the arguments of the first graph's calls are in the second, where they differ.

    Args:
        one: a graph whose nodes have a key in their meta.
        other: a graph of the same model, made in another mode.
        key: the name of the key.

    Returns:
        Key of a node -> name or place of an argument -> its value in the second graph. A counter
        that only the first one has counts by 0 in the other.

    Raises:
        TraceError: they differ in more than numbers; names the module.
    """
    found: Numbers = {node.meta[key]: {"other": 0} for node in _counters(one)}
    found |= {node.meta[key]: places for node, places in _differences(one, other)}
    return found


def arguments(node: fx.Node) -> dict[int | str, Any]:
    """What a call is given, by name where the operator has names, with what is left out."""
    if not isinstance(node.target, torch._ops.OpOverload):
        by_place: dict[int | str, Any] = {**dict(enumerate(node.args))}
        by_place.update(node.kwargs)
        return by_place
    declared = node.target._schema.arguments
    given: dict[int | str, Any] = {a.name: a.default_value for a in declared}
    given.update(zip((a.name for a in declared), node.args, strict=False))
    given.update(node.kwargs)
    return given


def put_argument(node: fx.Node, place: int | str, value: Any) -> None:
    """Gives a call another value under a key of `arguments`."""
    index = list(arguments(node)).index(place)
    if index < len(node.args):
        node.update_arg(index, value)
    else:
        node.update_kwarg(str(place), value)


def _differences(one: fx.Graph, other: fx.Graph) -> Iterator[tuple[fx.Node, Places]]:
    nodes, others = _calls(one), _calls(other)
    twins: dict[Any, Any] = {}
    for node, twin in zip(nodes, others, strict=False):
        twins[node] = twin
        is_same = node.op == twin.op and (node.target == twin.target or node.op == "placeholder")
        if not is_same or not _run_the_same(node, twin):
            raise _differ(node, twin)
        places = _places(node, twin, twins)
        if places:
            yield node, places
    if len(nodes) != len(others):
        longer = max(nodes, others, key=len)
        raise _differ(longer[min(len(nodes), len(others))], None)


def _run_the_same(node: fx.Node, twin: fx.Node) -> bool:
    """Whether the blocks that two calls run are one: what is in them is not switched."""
    pairs = zip(blocks_of(node), blocks_of(twin), strict=False)
    return not any(any(_differences(*pair)) for pair in pairs)


def _calls(graph: fx.Graph) -> list[fx.Node]:
    """All nodes but those that fetch tensors, which are known by their names, and guards.

    A tensor that is contiguous already is its own copy, which a tracer does not write down:
    attention lays out its result otherwise in training.
    """
    copies = graph.find_nodes(op="call_function", target=aten.contiguous.default)
    skipped = {*_counters(graph), *copies, *graph.find_nodes(op="get_attr")}
    return [n for n in graph.nodes if n not in skipped and n.target != GUARDS]


def _counters(graph: fx.Graph) -> Iterator[fx.Node]:
    """What counts calls, as batch-norm does in training: a tensor that nothing else reads."""
    for node in graph.nodes:
        if node.target is aten.add_.Tensor and not node.users and not node.kwargs:
            tensor, step = node.args
            if isinstance(step, int) and tensor.op == "get_attr" and len(tensor.users) == 1:
                yield node


def _places(node: fx.Node, twin: fx.Node, twins: dict[Any, Any]) -> Places:
    left, right = arguments(node), arguments(twin)
    if left.keys() != right.keys():
        raise _differ(node, twin)
    found: Places = {}
    for place, value in left.items():
        if _same(value, right[place], twins):
            continue
        if not all(isinstance(v, bool | int | float) for v in (value, right[place])):
            raise _differ(node, twin)
        found[place] = right[place]
    return found


def _same(value: Any, other: Any, twins: dict[Any, Any]) -> bool:
    leaves, spec = pytree.tree_flatten(value)
    others, other_spec = pytree.tree_flatten(other)
    if spec != other_spec:
        return False
    return all(_is_twin(a, b, twins) for a, b in zip(leaves, others, strict=True))


def _is_twin(value: Any, other: Any, twins: dict[Any, Any]) -> bool:
    if not isinstance(value, fx.Node) or not isinstance(other, fx.Node):
        return type(value) is type(other) and bool(value == other)
    value, other = _copied(value), _copied(other)
    if value.op == "get_attr":
        return other.op == "get_attr" and bool(value.target == other.target)
    return twins.get(value) is other


def _copied(node: fx.Node) -> fx.Node:
    """What a node is a contiguous copy of."""
    while node.target is aten.contiguous.default:
        node = node.all_input_nodes[0]
    return node


def _differ(node: fx.Node, twin: fx.Node | None) -> TraceError:
    inner = twin if twin is not None and node.op == "output" else node
    path = module_path(inner) or "the model itself"
    calls = " and ".join(str(n.target) for n in (node, twin) if n is not None)
    return TraceError(f"{path} computes something else there ({calls})")
