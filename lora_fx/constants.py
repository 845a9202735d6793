"""What a graph computes from its own constants alone, evaluated when asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lora_fx.graphs import attribute
from lora_fx.ops import mutates, op_name

_RANDOM = {
    *("rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "randperm"),
    *("bernoulli", "dropout", "normal", "multinomial", "poisson", "uniform", "exponential"),
    *("alpha_dropout", "feature_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d"),
    *("dropout3d", "rrelu", "gumbel_softmax", "binomial", "empty_like", "new_empty"),
}


class Constants:
    """The constants of one graph: which nodes are, their shapes, and their values.

    Shapes come from running on meta tensors, so that looking at a weight never reads it.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._meta: dict[fx.Node, Any] = {}
        self.nodes: set[fx.Node] = set()

    def admit(self, node: fx.Node) -> bool:
        """Decides whether a node is constant; its inputs must have been asked about before."""
        constant = self._is_tensor(node) if node.op == "get_attr" else self._computable(node)
        if constant:
            self.nodes.add(node)
        return constant

    def shape(self, node: fx.Node) -> tuple[int, ...] | None:
        """The shape of a constant, or None if it is no tensor or depends on values."""
        value = self._on_meta(node)
        return tuple(value.shape) if isinstance(value, torch.Tensor) else None

    def dtype(self, node: fx.Node) -> torch.dtype:
        """The dtype of a constant, as the graph computes it."""
        dtype: torch.dtype = self._on_meta(node).dtype
        return dtype

    def value(self, node: fx.Node) -> torch.Tensor:
        """Evaluates a constant from leaves widened to float32 or more."""
        computed: dict[fx.Node, Any] = {}
        for step in _order(node, computed):
            computed[step] = self._run(step, computed)
        result: torch.Tensor = computed[node]
        return result

    def _is_tensor(self, node: fx.Node) -> bool:
        return isinstance(attribute(self._gm, str(node.target)), torch.Tensor)

    def _computable(self, node: fx.Node) -> bool:
        if node.op not in ("call_function", "call_method") or not node.all_input_nodes:
            return False
        if mutates(node) or _is_random(node):
            return False
        return all(source in self.nodes for source in node.all_input_nodes)

    def _run(self, node: fx.Node, computed: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return _widened(attribute(self._gm, str(node.target)).detach())
        return _widened(_call(node, computed))

    def _on_meta(self, node: fx.Node) -> Any:
        for step in _order(node, self._meta):
            self._meta[step] = self._meta_of(step)
        return self._meta[node]

    def _meta_of(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return attribute(self._gm, str(node.target)).to("meta")
        if any(self._meta[source] is None for source in node.all_input_nodes):
            return None
        try:
            return _call(node, self._meta)
        except (RuntimeError, NotImplementedError):
            return None  # an operator whose shape depends on values, or without a meta kernel


def _is_random(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded in node.target.tags
    return op_name(node) in _RANDOM


def _widened(value: Any) -> Any:
    """A tensor in float32 or more: a cast to less rounds, and does not narrow what follows."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _order(node: fx.Node, known: dict[fx.Node, Any]) -> list[fx.Node]:
    """The node and what it needs that is not known yet, in the order of the graph."""
    needed = {node} - known.keys()
    pending = list(needed)
    while pending:
        fresh = [n for n in pending.pop().all_input_nodes if n not in needed and n not in known]
        needed.update(fresh)
        pending.extend(fresh)
    return sorted(needed)


def _call(node: fx.Node, computed: dict[fx.Node, Any]) -> Any:
    args = fx.node.map_arg(node.args, computed.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, computed.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if not callable(node.target):
        raise TypeError(f"{node.target} of {node} is not callable")
    return node.target(*args, **kwargs)
