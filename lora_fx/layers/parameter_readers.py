"""Who reads a parameter or buffer of a graph, named by the path of its module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import fx

from lora_fx.graph.lazy_tensor import LazyTensor, find_tensor, get_unevaluated
from lora_fx.graph.ops import holder_path
from lora_fx.layers.sites import Site, sites
from lora_fx.layers.weight_parts import Read, part_of

_CALLS = ("call_function", "call_method")
CLOSED = (
    "lies in a module that symbolic tracing keeps whole, where nothing can be adapted: trace the "
    "model with example inputs, which opens it"
)


def readers(gm: fx.GraphModule, parameter: str) -> Iterator[Read]:
    """Who reads ``<module path>.<name>``: pairs of a call and the ``get_attr`` node it reads.

    Told by the module that made the call, since a tied parameter bears another module's name;
    where none of its calls does, by the layer that the graph has at that path, or the table of
    that name, else by the name: a module that is not called lends its weight.
    """
    path, _, name = parameter.rpartition(".")
    own = [n for n in gm.graph.nodes if n.op in _CALLS and holder_path(n) == path]
    found = _reads(own, name) or _reads(_calls_of_layers(gm, parameter), name)
    if found:
        return iter(found)
    lent = [n for n in gm.graph.find_nodes(op="get_attr") if n.target == parameter]
    return ((user, node) for node in lent for user in node.users if user.op in _CALLS)


def _calls_of_layers(gm: fx.GraphModule, parameter: str) -> list[fx.Node]:
    """The calls of the layers at the path of a parameter, or of those that look it up."""
    layers, path = sites(gm), parameter.rpartition(".")[0]
    of_name = [s for s in layers if s.path == path]
    found = of_name or [s for s in layers if _is_table(s, parameter)]
    return list(dict.fromkeys(call for site in found for call in _calls(gm, site)))


def _reads(calls: Sequence[fx.Node], name: str) -> list[Read]:
    """Which of the calls read a tensor whose own name is this."""
    return [
        (node, source)
        for node in calls
        for source in node.all_input_nodes
        if source.op == "get_attr" and str(source.target).rpartition(".")[2] == name
    ]


def tensor_of(gm: fx.GraphModule, parameter: str) -> torch.Tensor | LazyTensor | None:
    """The tensor that a graph has for ``<module path>.<name>``; None if nothing reads one."""
    read = next(readers(gm, parameter), None)
    if read is not None:
        return cast(torch.Tensor, get_unevaluated(gm, str(read[1].target)))
    return find_tensor(gm, parameter) if is_inside(gm, parameter) else None


def is_inside(gm: fx.GraphModule, parameter: str) -> bool:
    """Whether a tensor would be of a module that is called whole, as symbolic traces keep norms.

    No node fetches such a tensor: the module in the graph holds it.
    """
    called = (str(node.target) for node in gm.graph.nodes if node.op == "call_module")
    return any(parameter.startswith(f"{path}.") for path in called)


def _calls(gm: fx.GraphModule, site: Site) -> tuple[fx.Node, ...]:
    """A layer's call, and what picks its weight and bias."""
    bias = part_of(gm, site.bias)
    return *site.part.calls, *(bias.calls if bias else ()), site.node


def _is_table(site: Site, parameter: str) -> bool:
    return site.type.reads_ids and site.is_whole and site.weight.target == parameter
