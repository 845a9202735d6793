"""What adapters bring into a graph: tensors, told by name, and weights ``W' = f(W, values)``."""

from __future__ import annotations

import keyword
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from torch import fx, nn

from lora_fx.graph.ops import aten, needed

_MARK = ".lora_weight_"
_STEPS = 200  # nodes that an operand may be made of: what is more is no adapter's function
_OWN = frozenset(vars(nn.Module()))  # what only an instance has: training, _parameters, ...


class Names(NamedTuple):
    """What a branch calls its tensors."""

    down: str
    up: str
    bias: str
    gain: str
    col: str


def parameter_names(path: str, name: str, bare: bool = False) -> Names:
    """What the branch of adapter ``name`` at ``path`` calls its tensors."""
    at, own = _place(path, name, bare)
    return Names(*[f"{at}.lora_{kind}.{own}" for kind in ("A", "B", "bias", "gain", "col")])


def value_names(path: str, name: str, count: int, bare: bool = False) -> list[str]:
    """What adapter ``name`` calls the values from which it makes the weight of a layer anew."""
    at, own = _place(path, name, bare)
    return [f"{at}{_MARK}{place}.{own}" for place in range(count)]


def _place(path: str, name: str, bare: bool) -> tuple[str, str]:
    """Where the tensors of adapter ``name`` at ``path`` are, and how the name of each ends.

    Where the path is that of a ``bare`` weight, they live beside it: nothing fits below a tensor.
    """
    return f"{path}_adapted" if bare else path, part_of(name)


def is_factor(target: str) -> bool:
    """Whether a tensor is one that an injected adapter brought: `parameter_names`."""
    *_, holder, name = ("", *target.split("."))
    return holder in ("lora_A", "lora_B") or name.startswith(("lora_shrink", "lora_expand"))


def part_of(name: str) -> str:
    """What tensors are called by: ``is`` becomes ``is_``, because Python cannot say ``x.is``.

    So do names that every module has already (``train``, ``half``), and what would be read back
    as one of these (``is_`` becomes ``is__``).
    """
    return f"{name}_" if _is_taken(name) else name


def name_in(target: str) -> str:
    """The adapter's name out of the name of one of its tensors: what `part_of` made of it."""
    part = target.rpartition(".")[2]
    return part[:-1] if part.endswith("_") and _is_taken(part[:-1]) else part


@lru_cache(maxsize=1024)
def _is_taken(name: str) -> bool:
    """Whether a name is taken, or is a taken one with underscores behind it."""
    shorter = [name[:end] for end in range(len(name.rstrip("_")), len(name) + 1)]
    return any(keyword.iskeyword(w) or hasattr(nn.Module, w) or w in _OWN for w in shorter)


class ParametrizedWeight(NamedTuple):
    """An operand that an adapter made.

    Attributes:
        operand: an ``alias``, which says where the adapter's calls end and the model's begin, of
            what is computed from its source and the adapter's values alone.
        adapter: the adapter's name.
        source: what it was made of: the stored weight, or what another adapter made of that.
        stored: the stored weight.
    """

    operand: fx.Node
    adapter: str
    source: fx.Node
    stored: fx.Node


def parametrized_weights(graph: fx.Graph) -> list[ParametrizedWeight]:
    """Every operand that an adapter made, a later one of the same weight behind the earlier."""
    found: dict[fx.Node, ParametrizedWeight] = {}
    for end in graph.find_nodes(op="call_function", target=aten.alias.default):
        if (made := _made(end, found)) is not None:
            found[end] = made
    return list(found.values())


def recorded(graph: fx.Graph) -> Mapping[fx.Node, fx.Node]:
    """The operands that adapters made: each with the stored weight that it was made of."""
    return {made.operand: made.stored for made in parametrized_weights(graph)}


def makers(operands: Iterable[fx.Node]) -> set[fx.Node]:
    """The calls by which adapters make operands, these included: no layer is among them."""
    return {node for operand in operands for node in needed(operand)}


def adapters_of(operand: fx.Node) -> list[str]:
    """The names of the adapters that made an operand, or what it is picked of."""
    found: dict[str, None] = {}
    nodes, most = [operand], _STEPS
    for node in nodes:  # grows
        if node.op == "get_attr" and _MARK in str(node.target):
            found[name_in(str(node.target))] = None
        most += _STEPS if node.target is aten.alias.default else 0
        nodes += [source for source in node.all_input_nodes if source not in nodes]
        if len(nodes) > most:
            break
    return list(found)


def behind(
    graph: fx.Graph, reads: Iterable[tuple[fx.Node, fx.Node]]
) -> Sequence[tuple[fx.Node, fx.Node]]:
    """Who reads a weight, or what adapters made of it: the calls that make that read no more."""
    ends = [(made.operand, makers([made.operand])) for made in parametrized_weights(graph)]
    found: dict[tuple[fx.Node, fx.Node], None] = {}
    for reader, source in reads:
        last = next((end for end, inner in reversed(ends) if reader in inner), None)
        outer = [(reader, source)] if last is None else [(user, last) for user in last.users]
        found |= dict.fromkeys(outer)
    return list(found)


def _made(end: fx.Node, below: Mapping[fx.Node, ParametrizedWeight]) -> ParametrizedWeight | None:
    """What made an operand, or None if no adapter did."""
    name, source = "", None
    pending, steps = list(end.all_input_nodes), 0
    while pending and steps < _STEPS:
        node, steps = pending.pop(), steps + 1
        if node in below:
            source = node
        elif node.op == "get_attr":
            is_value = _MARK in str(node.target)
            name, source = (name_in(str(node.target)), source) if is_value else (name, node)
        elif node.op == "call_function":
            pending.extend(node.all_input_nodes)
        else:
            return None
    if not name or source is None or pending:
        return None
    return ParametrizedWeight(
        end, name, source, below[source].stored if source in below else source
    )
