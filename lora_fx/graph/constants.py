"""Constant evaluation: what a graph computes from its own tensors alone, when asked for."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, KeysView, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lora_fx.graph.lazy_tensor import TensorSnapshot, get_unevaluated
from lora_fx.graph.ops import function_name, is_nested, mutates, op_name
from lora_fx.numerics import widened

_RANDOM = {
    *("rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "randperm"),
    *("bernoulli", "dropout", "normal", "multinomial", "poisson", "uniform", "exponential"),
    *("alpha_dropout", "feature_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d"),
    *("dropout3d", "rrelu", "gumbel_softmax", "binomial", "empty_like", "new_empty"),
}
_LONG = 200  # calls, each as often as it would be written
# What makes a tensor of nothing but numbers.
_FACTORIES = {"zeros", "ones", "full", "eye", "arange", "tensor", "scalar_tensor", "linspace"}


@dataclass(frozen=True)
class _Step:
    """A call as it was when its node was admitted: erasing a node empties it.

    Attributes:
        place: its place among all constants.
        inputs: the nodes it reads.
    """

    place: int
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[fx.Node, ...]


class Constants:
    """The constants of one graph: which nodes are, their shapes, and their values.

    Shapes come from running on meta tensors, so that looking at a weight never reads it. Calls
    and tensors are held from the moment a node is admitted: the graph may change afterwards.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._steps: dict[fx.Node, _Step] = {}
        self._tensors: dict[fx.Node, TensorSnapshot] = {}
        self._meta: dict[fx.Node, Any] = {}
        self._keys: dict[fx.Node, int] = {}
        self._lengths: dict[fx.Node, int] = {}
        self._known: dict[Hashable, int] = {}

    def admit(self, node: fx.Node) -> bool:
        """Decides whether a node is constant; its inputs must have been asked about before."""
        constant = self._is_tensor(node) if node.op == "get_attr" else self._computable(node)
        if constant:
            inputs = tuple(node.all_input_nodes)
            step = (node.op, node.target, node.args, node.kwargs, inputs)
            self._steps[node] = _Step(len(self._steps), *step)
        return constant

    @property
    def nodes(self) -> KeysView[fx.Node]:
        """The nodes that were admitted."""
        return self._steps.keys()

    def shape(self, node: fx.Node) -> tuple[int, ...] | None:
        """The shape of a constant, or None if it is no tensor or depends on values."""
        value = self.on_meta(node)
        return tuple(value.shape) if isinstance(value, torch.Tensor) else None

    def dtype(self, node: fx.Node) -> torch.dtype:
        """The dtype of a constant, as the graph computes it."""
        dtype: torch.dtype = self.on_meta(node).dtype
        return dtype

    def is_floating(self, node: fx.Node) -> bool:
        """Whether a constant is a tensor of real numbers."""
        value = self.on_meta(node)
        return isinstance(value, torch.Tensor) and value.is_floating_point()

    def leaves(
        self, calls: Iterable[fx.Node], but: Collection[fx.Node] = ()
    ) -> Mapping[fx.Node, TensorSnapshot]:
        """The tensors that the constants which calls read are made of, but for some of these."""
        read = {source for call in calls for source in call.all_input_nodes} - set(but)
        steps = {step for source in read & self.nodes for step in self._order(source, {})}
        return {step: self._tensors[step] for step in steps - set(but) if step in self._tensors}

    def is_trained(self, calls: Iterable[fx.Node], but: fx.Node) -> bool:
        """Whether calls read parameters that take gradients, other than those of a base layer."""
        leaves = self.leaves(calls, but.all_input_nodes)
        return any(held.is_trained for held in leaves.values())

    def value(self, node: fx.Node) -> Any:
        """Evaluates a constant from leaves widened to float32 or more."""
        computed: dict[fx.Node, Any] = {}
        order = self._order(node, computed)
        last = {source: step for step in order for source in self._steps[step].inputs}
        for step in order:
            computed[step] = self._run(step, computed)
            for source in self._steps[step].inputs:
                if last[source] is step:
                    computed.pop(source, None)  # one large constant at a time
        return computed[node]

    def key(self, node: fx.Node) -> int:
        """Equal for two constants that are computed alike from the same tensors."""
        for step in self._order(node, self._keys):
            self._keys[step] = self._known.setdefault(self._written(step), len(self._known))
        return self._keys[node]

    def is_long(self, node: fx.Node) -> bool:
        """Whether a constant is better known by its value than written out.

        What reads one matrix twice, and does so again with the result, doubles at each step.
        """
        for step in self._order(node, self._lengths):
            inputs = self._steps[step].inputs
            before = (self._lengths[source] for source in inputs)
            self._lengths[step] = 1 + sum(1 if length > _LONG else length for length in before)
        return self._lengths[node] > _LONG

    def _written(self, node: fx.Node) -> Hashable:
        step = self._steps[node]
        if step.op == "get_attr":
            return str(step.target)
        arguments = fx.node.map_arg((step.args, step.kwargs), lambda n: ("node", self._keys[n]))
        return (step.target, repr(arguments))

    def _is_tensor(self, node: fx.Node) -> bool:
        if not hasattr(get_unevaluated(self._gm, str(node.target)), "dtype"):
            return False
        self._tensors[node] = TensorSnapshot.of(self._gm, str(node.target))
        return True

    def _computable(self, node: fx.Node) -> bool:
        if node.op not in ("call_function", "call_method") or mutates(node) or _is_random(node):
            return False
        if is_nested(node):
            return False
        if not node.all_input_nodes:
            return node.op == "call_function" and function_name(node.target) in _FACTORIES
        return all(source in self.nodes for source in node.all_input_nodes)

    def _run(self, node: fx.Node, computed: dict[fx.Node, Any]) -> Any:
        if node in self._tensors:
            return _widened(self._tensors[node].read())
        return _widened(called(self._steps[node], computed))

    def on_meta(self, node: fx.Node) -> Any:
        """The constant without its numbers: a meta tensor, or a value that is no tensor."""
        for step in self._order(node, self._meta):
            self._meta[step] = self._meta_of(step)
        return self._meta[node]

    def _meta_of(self, node: fx.Node) -> Any:
        step = self._steps[node]
        if node in self._tensors:
            value = self._tensors[node].value
            return torch.empty(value.shape, dtype=value.dtype, device="meta")
        seen = node.meta.get("val")
        device = None if step.inputs else "meta"
        if any(self._meta[source] is None for source in step.inputs):
            return _like(seen)
        try:
            return called(step, self._meta, device)
        except (RuntimeError, NotImplementedError):
            return _like(seen)  # its shape depends on values, or it has no meta kernel

    def _order(self, node: fx.Node, known: Mapping[fx.Node, Any]) -> list[fx.Node]:
        """The node and what it needs that is not known yet, in the order of the graph."""
        if node in known or not self._steps[node].inputs:
            return [] if node in known else [node]
        needed = {node}
        pending = [node]
        while pending:
            inputs = self._steps[pending.pop()].inputs
            fresh = [n for n in inputs if n not in needed and n not in known]
            needed.update(fresh)
            pending.extend(fresh)
        return sorted(needed, key=lambda n: self._steps[n].place)


def _like(seen: Any) -> Any:
    """What the tracer saw, if it is a tensor whose sizes are numbers."""
    if not isinstance(seen, torch.Tensor) or not all(type(size) is int for size in seen.shape):
        return None
    return torch.empty(tuple(seen.shape), dtype=seen.dtype, device="meta")


def _is_random(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded in node.target.tags
    return op_name(node) in _RANDOM


def _widened(value: Any) -> Any:
    """A tensor in float32 or more: a cast to less rounds, and does not narrow what follows."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return widened(value)


def called(
    step: _Step | fx.Node, computed: Mapping[fx.Node, Any], device: str | None = None
) -> Any:
    """What a function or a method gives for what its arguments are known to be.

    Raises:
        TypeError: it is neither.
    """
    args = fx.node.map_arg(step.args, computed.__getitem__)
    kwargs = dict(fx.node.map_arg(step.kwargs, computed.__getitem__))
    if device is not None:
        kwargs["device"] = torch.device(device)
    if step.op == "call_method":
        return getattr(args[0], str(step.target))(*args[1:], **kwargs)
    if not callable(step.target):
        raise TypeError(f"{step.target} is not callable")
    return step.target(*args, **kwargs)
