"""Training and eval mode of a graph: recorded flags follow ``.train()`` and ``.eval()``.

A tracer records the mode that a model is in: ``dropout(x, 0.1, False)``. To follow, the model is
traced again in the other mode, once, when somebody first asks for it; where the two graphs differ
in numbers alone, such as flags and probabilities, the numbers are exchanged. A model that takes
another way in the other mode is refused by name.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from lora_fx.aligned import Numbers, arguments, differing_numbers, put_argument
from lora_fx.errors import TraceError, shorten
from lora_fx.lazy_compile import compile_when_read
from lora_fx.ops import aten, call_argument, function_name, module_path

_META = "lora_fx.source"
_KEY = "lora_fx.traced"
# How operators spell that they run in training, and what eval mode would have recorded.
EVAL_FLAGS = {"training": False, "train": False, "use_input_stats": False, "dropout_p": 0.0}


@dataclass(frozen=True)
class Again:
    """A model in another mode.

    Attributes:
        graph: as it is traced there.
        modes: path -> training mode of each module: a model may keep some of them as they are.
        unsteady: why two calls may differ.
    """

    graph: fx.Graph
    modes: dict[str, bool]
    unsteady: str | None


@dataclass
class Source:
    """The model that a graph was traced from, for as long as the graph lives.

    Attributes:
        name: class of the model.
        graph: as it was traced.
        modes: path -> training mode of each module, as it was traced.
        again: traces the model once more, in the mode that is given.
        unsteady: the same of the mode that it was traced in.
    """

    name: str
    graph: fx.Graph
    modes: dict[str, bool]
    again: Callable[[bool], Again]
    unsteady: str | None
    _numbers: dict[bool, Numbers] = field(default_factory=dict)
    _others: dict[bool, Again] = field(default_factory=dict)

    def numbers(self, mode: bool) -> Numbers:
        """What the graph holds in a mode, where the modes differ: key -> place -> value.

        Raises:
            TraceError: the model cannot be traced in that mode, or takes another way there.
        """
        if mode not in self._numbers:
            self._numbers[mode] = self._found(mode)
        wanted: Numbers = {}
        nodes = {node.meta[_KEY]: node for node in self.graph.nodes}
        for other, known in self._numbers.items():
            for key, places in known.items():
                given = arguments(nodes[key])
                held = {place: given[place] for place in places}
                wanted[key] = {**held, **wanted.get(key, {})}
                if other == mode:
                    wanted[key] |= places
        return wanted

    def unsteady_in(self, mode: bool) -> str | None:
        """Why two calls of the model in a mode may differ, or None."""
        return self._in(mode).unsteady

    def modes_in(self, mode: bool) -> dict[str, bool]:
        """The mode of each module when the model is told to be in one."""
        return self._in(mode).modes

    def _in(self, mode: bool) -> Again:
        if mode not in self._others:
            as_it_is = set(self.modes.values()) <= {mode}
            traced = Again(self.graph, self.modes, self.unsteady)
            self._others[mode] = traced if as_it_is else self.again(mode)
        return self._others[mode]

    def _found(self, mode: bool) -> Numbers:
        other = self._in(mode)
        try:
            return differing_numbers(self.graph, other.graph, _KEY)
        except TraceError as error:
            was, now = ("eval", "training") if mode else ("training", "eval")
            raise TraceError(
                f"{self.name} was traced in {was} mode and cannot be switched to {now} mode: "
                f"{error}\nTry: lora_fx.trace(model.{'train' if mode else 'eval'}(), ...), or "
                "set the mode of injected modules alone: "
                'gm.get_submodule("<path>.lora_dropout.<adapter>").train()'
            ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> Source:
        """Shared: it is never changed, and a copy would hold a second model."""
        return self

    def __reduce__(self) -> Any:
        """Not written: a file would hold the model."""
        return _nothing, ()


def _nothing() -> None:
    return None


class Traced(fx.GraphModule):
    """A GraphModule whose recorded flags follow its mode."""

    def train(self, mode: bool = True) -> Traced:
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


def mark(gm: fx.GraphModule) -> None:
    """Marks the nodes of a fresh graph, so that copies of them are known again."""
    for number, node in enumerate(gm.graph.nodes):
        node.meta[_KEY] = f"{number} {node.name}"


@contextmanager
def in_mode(model: nn.Module, mode: bool) -> Iterator[dict[str, bool]]:
    """A model in one mode, and the mode that each module then has.

    A ``train`` of its own, which may do anything to weights, is asked on a copy.
    """
    modules = dict(model.named_modules())
    wanted = dict.fromkeys(modules, mode)
    own = any(type(m).train not in (nn.Module.train, Traced.train) for m in modules.values())
    if own:
        probe = copy.deepcopy(model).train(mode)
        wanted = {path: module.training for path, module in probe.named_modules()}
    graph = model if isinstance(model, Traced) else None
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


def remember(gm: fx.GraphModule, source: Source) -> None:
    """Tells a graph, and all that passes make of it, where it comes from."""
    gm.meta[_META] = source


def source_of(gm: fx.GraphModule) -> Source | None:
    """Where a graph comes from, if it is known."""
    source = gm.meta.get(_META)
    return source if isinstance(source, Source) else None


def follow(gm: fx.GraphModule, mode: bool) -> None:
    """Switches what a graph has recorded of a mode, in place.

    Raises:
        TraceError: it cannot be switched.
    """
    source = source_of(gm)
    if source is None:
        _refuse_flags(gm, mode)
        return
    numbers = source.numbers(mode)
    changed = [
        _set(n, numbers[n.meta[_KEY]]) for n in gm.graph.nodes if n.meta.get(_KEY) in numbers
    ]
    if any(changed):
        compile_when_read(gm, gm.graph)


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


def _refuse_flags(gm: fx.GraphModule, mode: bool) -> None:
    wrong = [
        f"{module_path(node) or 'the model itself'} ({node.name})"
        for node in gm.graph.nodes
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


def _is_wrong(name: str, value: Any, mode: bool) -> bool:
    if name == "dropout_p":  # in eval mode 0.0, as it is in training where nothing drops
        return not mode and bool(value)
    return value is not None and bool(value) != mode


def _set(node: fx.Node, values: dict[int | str, Any]) -> bool:
    held = arguments(node)
    changed = {place: value for place, value in values.items() if held[place] != value}
    for place, value in changed.items():
        put_argument(node, place, value)
    return bool(changed)
