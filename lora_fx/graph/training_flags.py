"""The arguments by which operators are told that they run in training."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import fx

from lora_fx.errors import TraceError, shorten
from lora_fx.graph.ops import aten, call_argument, function_name, module_path

# What eval mode would have recorded.
EVAL_FLAGS = {"training": False, "train": False, "use_input_stats": False, "dropout_p": 0.0}


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
