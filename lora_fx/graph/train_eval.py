"""Training and eval mode of a graph: recorded flags follow ``.train()`` and ``.eval()``.

A tracer records the mode that a model is in: ``dropout(x, 0.1, False)``. To follow, the model is
traced again in the other mode, once, when somebody first asks for it; where the two graphs differ
in numbers alone, such as flags and probabilities, the numbers are exchanged. A model that takes
another way in the other mode is refused by name.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from lora_fx.errors import TraceError, shorten
from lora_fx.graph.alignment import arguments, put_argument
from lora_fx.graph.lazy_compile import compile_when_read
from lora_fx.graph.ops import aten, blocks_of, call_argument, function_name, module_path
from lora_fx.graph.retracing import KEY, source_of

# What eval mode would have recorded.
EVAL_FLAGS = {"training": False, "train": False, "use_input_stats": False, "dropout_p": 0.0}


class TracedGraph(fx.GraphModule):
    """A GraphModule whose recorded flags follow its mode."""

    def train(self, mode: bool = True) -> TracedGraph:
        """Sets the mode of every module, and of what the graph has recorded.

        Raises:
            TraceError: the graph cannot follow; names the modules, and says what to do.
        """
        follow(self, mode)
        super().train(mode)
        source = source_of(self)
        own = source.modes_in(mode) if source is not None else {}
        for path, module in self.named_modules():
            module.training = own.get(path, mode)
        return self


@contextmanager
def in_mode(model: nn.Module, mode: bool) -> Iterator[dict[str, bool]]:
    """A model in one mode, and the mode that each module then has.

    A ``train`` of its own, which may do anything to weights, is asked on a copy.
    """
    modules = dict(model.named_modules())
    wanted = dict.fromkeys(modules, mode)
    own = any(type(m).train not in (nn.Module.train, TracedGraph.train) for m in modules.values())
    if own:
        probe = copy.deepcopy(model).train(mode)
        wanted = {path: module.training for path, module in probe.named_modules()}
    graph = model if isinstance(model, TracedGraph) else None
    before = {path: module.training for path, module in modules.items()}
    if graph is not None:
        follow(graph, mode)
    try:
        for path, module in modules.items():
            module.training = wanted[path]
        yield wanted
    finally:
        for path, module in modules.items():
            module.training = before[path]
        if graph is not None:
            follow(graph, before[""])


def follow(gm: fx.GraphModule, mode: bool) -> None:
    """Switches what a graph has recorded of a mode, in place.

    Raises:
        TraceError: it cannot be switched.
    """
    source = source_of(gm)
    if source is None:
        refuse_flags(gm, mode)
        return
    numbers = source.numbers(mode)
    changed = [_set(n, numbers[n.meta[KEY]]) for n in gm.graph.nodes if n.meta.get(KEY) in numbers]
    if any(changed):
        compile_when_read(gm, gm.graph)


def _set(node: fx.Node, values: dict[int | str, Any]) -> bool:
    held = arguments(node)
    changed = {place: value for place, value in values.items() if held[place] != value}
    for place, value in changed.items():
        put_argument(node, place, value)
    return bool(changed)


def flags(node: fx.Node) -> dict[str, tuple[int, str, Any]]:
    """The arguments of a call that say whether it runs in training.

    Returns:
        Its name -> its place, name and default, as `call_argument` takes them.
    """
    if node.op != "call_function":
        return {}
    known = _declared(node.target)
    mean = known.get("running_mean")
    if mean is not None and call_argument(node, *mean) is None:
        return {}  # keeps no statistics: those of the batch are all it has, in eval mode too
    return {name: known[name] for name in EVAL_FLAGS if name in known}


@cache
def _declared(target: Any) -> dict[str, tuple[int, str, Any]]:
    """The arguments of a function by name."""
    if isinstance(target, torch._ops.OpOverload):
        declared = enumerate(target._schema.arguments)
        return {
            argument.name: (i, argument.name, argument.default_value) for i, argument in declared
        }
    try:
        found = enumerate(inspect.signature(target).parameters.values())
        return {p.name: (i, p.name, None if p.default is p.empty else p.default) for i, p in found}
    except ValueError:  # a builtin of torch: aten has it under the same name
        operator = getattr(getattr(aten, function_name(target), None), "default", None)
        return {} if operator is None else _declared(operator)


def refuse_flags(gm: fx.GraphModule, mode: bool) -> None:
    """Refuses what was recorded in another mode, where it is not known how to switch it.

    Raises:
        TraceError: names the modules, and says what to do.
    """
    wrong = [
        f"{module_path(node) or 'the model itself'} ({node.name})"
        for node in _with_blocks(gm.graph)
        for name, at in flags(node).items()
        if _is_wrong(name, call_argument(node, *at), mode)
    ]
    if wrong:
        now, word = ("training", "train") if mode else ("eval", "eval")
        raise TraceError(
            f"{shorten(wrong)}: recorded in the other mode, and it is not known what the model "
            f"does in {now} mode. Try: lora_fx.trace(model.{word}(), ...) of the module itself, or "
            'frontend="symbolic"'
        )


def _with_blocks(graph: fx.Graph) -> Iterator[fx.Node]:
    for node in graph.nodes:
        yield node
        for block in blocks_of(node):
            yield from _with_blocks(block)


def _is_wrong(name: str, value: Any, mode: bool) -> bool:
    if name == "dropout_p":  # in eval mode 0.0, as it is in training where nothing drops
        return not mode and bool(value)
    return value is not None and bool(value) != mode
