"""Checks a trace: model and graph run on the example inputs and must agree bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch._export.utils import _compiling_state_context
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from lora_fx.errors import TraceError, shorten
from lora_fx.frontend.first_difference import first_that_differs, first_that_draws
from lora_fx.frontend.for_any_input import for_any_input
from lora_fx.frontend.isolated_run import as_in_eager, own_inputs, preserved, random_kept, seed
from lora_fx.frontend.leaked_fakes import has_fakes
from lora_fx.frontend.one_row import with_one_row
from lora_fx.frontend.torch_export import distinct
from lora_fx.graph.aliasing import written
from lora_fx.graph.graph_module import targets
from lora_fx.graph.lazy_tensor import get_all_unevaluated
from lora_fx.numerics import compare, difference


class CallError(TraceError):
    """The model, or its graph, cannot be called on the example inputs."""


Inputs = tuple[tuple[Any, ...], dict[str, Any]]

# Calls after the first, where a call leaves something behind: enough for a counter to be seen.
_MORE_CALLS = 3
# What Python and numpy draw when it is tried whether a call looks at it: any bar that a number may
# pass or not is passed by one of the first two.
_OTHER_DRAWS = ("least", "greatest", 1, 2)
_PREPARED = (
    "The example gives one tensor twice, or a view with gaps, and the model asks for that; a graph "
    "cannot. Give the example as the graph takes it: .clone() of a tensor that is given twice, "
    ".contiguous() of a view."
)
_CAUSES = (
    "Python code of the model took one way when it was traced and takes another when it is run: a "
    "condition on values or counts, on the type of something, on whether it is being traced or "
    "compiled, on random numbers, a try around what a tracer refuses"
)


def check_faithful(model: nn.Module, gm: fx.GraphModule, inputs: Inputs) -> str | None:
    """Runs a model and its graph on the same inputs, from the same random state.

    Neither is changed: attributes, buffers, random states and inputs are put back.

    Args:
        model: in the mode that it was traced in.
        gm: its graph.
        inputs: args and kwargs, as the user gave them.

    Returns:
        Why a second call of the model may give something else than the first, or None.

    Raises:
        TraceError: they differ; names the first module whose output does.
    """
    if _without_values(model, inputs):
        return None
    dirty = _dirty(gm)
    with as_in_eager(), random_kept():
        drawn = seed()
        with preserved(model, dirty) as before:
            expected = _run(model, model, "fails", inputs)
            used, changed = drawn(), before.changes()
            again = _differing_call(model, inputs, expected) if changed else None
        seed()
        with preserved(gm, dirty):
            found = _run(gm, model, "has a graph that refuses", inputs)
        said, seen = difference(found, expected), _Seen(model, gm, inputs, dirty)
        if said is not None:
            _refuse(seen, said, used, changed)
        if used and seen.hangs_on_draws(expected):
            return seen.drawing(used)
        if not changed:
            _check_one_row(model, gm, inputs, dirty)
    if again is None:
        return None
    return f"{again}: a call changes {shorten(changed)}, and the next call gives another output"


def _check_one_row(
    model: nn.Module, gm: fx.GraphModule, inputs: Inputs, dirty: list[torch.Tensor]
) -> None:
    """Refuses a model that takes another way for one row than for several."""
    one = with_one_row(gm, inputs)
    if one is None:
        return
    seen = _Seen(model, gm, one, dirty)
    try:
        said = difference(seen.call(gm), seen.call(model))
    except TraceError:  # one of them takes no one row
        return
    if said is None or seen.is_rounding():
        return
    place = first_that_differs(model, gm, seen.call)
    raise TraceError(
        f"{type(model).__name__}: its graph is not the model where the batch is of one row, first "
        f"at {place}: {said}\nPython code of the model asks for this size, and a graph has the "
        "way of several rows. Say the condition with tensors (torch.where), or say in "
        "dynamic_shapes that there are more, by torch.export.Dim and its least size.\n"
        "To trace it all the same: check=False."
    )


def call_once(model: nn.Module, gm: fx.GraphModule, inputs: Inputs) -> None:
    """Calls a model for what its code keeps outside of it, such as caches."""
    with as_in_eager(), random_kept():
        _called_apart(model, inputs, _dirty(gm))


def _run(called: nn.Module, model: nn.Module, what: str, inputs: Inputs) -> Any:
    """What a call returns, and what it makes of its inputs: their tensors, not what holds them."""
    args, kwargs = own_inputs(inputs)
    given = pytree.tree_map(lambda leaf: leaf, (args, kwargs))  # a model may add to a dictionary
    try:
        returned = called(*args, **kwargs)
        if has_fakes(returned):
            raise TypeError("its own code keeps a tensor of the trace, which has no values")
        return {"output": returned, "inputs": given}
    except Exception as error:  # the model's own code runs in here and may raise anything
        reason = str(error).strip().partition("\n")[0]
        raise CallError(
            f"{type(model).__name__} was traced, but {what} the example inputs:\n"
            f"  {type(error).__name__}: {reason}\n"
            "Try: call the model once before it is traced, clear caches that its code fills while "
            "it is traced, and give the inputs that it is called with."
        ) from error


def _differing_call(model: nn.Module, inputs: Inputs, first: Any) -> str | None:
    for number in range(2, 2 + _MORE_CALLS):
        said = difference(_run(model, model, "fails when called again on", inputs), first)
        if said is not None:
            return f"call {number} on the same inputs differs from call 1 ({said})"
    return None


@dataclass(frozen=True)
class _Seen:
    """A model and its graph, for a closer look at what differs."""

    model: nn.Module
    gm: fx.GraphModule
    inputs: Inputs
    dirty: list[torch.Tensor]

    def call(self, called: nn.Module) -> Any:
        """One more call of the model or its graph, that leaves nothing behind."""
        return _called_apart(called, self.inputs, self.dirty)

    def hangs_on_draws(self, expected: Any) -> bool:
        """Whether other numbers of Python and numpy give something else.

        Models that drop layers when they train may draw, and not look, when they do not.
        """
        others = (
            _called_apart(self.model, self.inputs, self.dirty, draws) for draws in _OTHER_DRAWS
        )
        return any(difference(found, expected) is not None for found in others)

    def drawing(self, used: list[str]) -> str:
        """Which module draws random numbers that no graph can draw."""
        at = first_that_draws(self.model, self.call)
        return f"{at} draws numbers from {' and '.join(used)}, which no graph holds"

    def agrees_as_prepared(self) -> bool:
        """Whether they agree on inputs that are each a tensor of its own, without gaps."""
        prepared = replace(self, inputs=distinct(self.inputs))
        return difference(prepared.call(self.gm), prepared.call(self.model)) is None

    def agrees_as_exported(self) -> bool:
        """Whether they agree where the model's code, and torch's, is told that it is exported."""
        found = self.call(self.gm)
        try:
            with _compiling_state_context(), for_any_input():
                return difference(found, self.call(self.model)) is None
        except CallError:  # what it does then is for tracers alone
            return False

    def is_rounding(self) -> bool:
        """Whether they differ no more than two ways to compute one thing do."""
        ours, own = (pytree.tree_leaves(self.call(called)) for called in (self.gm, self.model))
        return len(ours) == len(own) and all(
            all(isinstance(leaf, torch.Tensor) for leaf in (a, b)) and compare(a, b).ok
            for a, b in zip(ours, own, strict=True)
            if difference(a, b) is not None
        )


def _refuse(seen: _Seen, said: str, used: list[str], changed: list[str]) -> None:
    """Names the module, and the cause if it can be told.

    A model that takes another way for one tensor given twice, as torch's attention does, is the
    same function of two; and one that has another for exports, as Qwen3-Next does, is the same if
    its numbers are.
    """
    prepared = seen.agrees_as_prepared()
    if (prepared or seen.agrees_as_exported()) and seen.is_rounding():
        return
    place = first_that_differs(seen.model, seen.gm, seen.call)
    cause = f"{_CAUSES}. Say it with tensors (torch.where), or fix it before tracing."
    if used:
        cause = f"{seen.drawing(used)}: draw them with torch."
    elif difference(seen.call(seen.model), seen.call(seen.model)) is not None:
        cause = "Two calls of the model itself differ, from the same random state."
    elif prepared:
        cause = _PREPARED
    elif changed:
        cause += f" A call of it changes {shorten(changed)}."
    raise TraceError(
        f"{type(seen.model).__name__}: its graph is not the model on the example inputs, first at "
        f"{place}: {said}\n{cause}\nTo trace it all the same: check=False."
    )


def _called_apart(
    called: nn.Module, inputs: Inputs, dirty: list[torch.Tensor], draws: int | str = 0
) -> Any:
    """One more call that leaves nothing behind."""
    seed(draws)
    with preserved(called, dirty):
        return _run(called, called, "fails when called again on", inputs)


def _dirty(gm: fx.GraphModule) -> list[torch.Tensor]:
    """The stored tensors that a graph writes to."""
    held = get_all_unevaluated(gm, targets(gm.graph))
    values = [held[str(node.target)] for node in written(gm.graph) if node.op == "get_attr"]
    return [value for value in values if isinstance(value, torch.Tensor)]


def _without_values(model: nn.Module, inputs: Inputs) -> bool:
    """Whether there is nothing to compute with: tensors of device meta, or fake ones."""
    tensors = [*pytree.tree_leaves(inputs), *model.parameters(), *model.buffers()]
    return any(isinstance(t, FakeTensor) or getattr(t, "is_meta", False) for t in tensors)
