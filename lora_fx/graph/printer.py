"""A graph as short, stable text, for reading and for golden tests."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import fx

from lora_fx.choices import takes
from lora_fx.errors import PassError
from lora_fx.graph.ops import GUARDS, op_name


@takes(PassError)
def text(gm: fx.GraphModule) -> str:
    """Prints one line a call; tensors appear by their name where they are read.

    ``linear_1 = linear(x, fc.weight, fc.bias)``. Names count calls of one operator, so they do
    not depend on how a version of torch names its nodes. torch.export's guards are not shown.
    """
    counts: Counter[str] = Counter()
    names: dict[fx.Node, str] = {}
    lines = []
    for node in gm.graph.nodes:
        if node.target == GUARDS:
            continue
        names[node] = _name(node, counts)
        if node.op == "placeholder":
            lines.append(f"{names[node]} = input()")
        elif node.op == "output":
            lines.append(f"return {_show(node.args[0], names)}")
        elif node.op != "get_attr":
            lines.append(f"{names[node]} = {_call(node, names)}")
    return "\n".join(lines)


def _name(node: fx.Node, counts: Counter[str]) -> str:
    if node.op in ("placeholder", "get_attr"):
        return str(node.target)
    operator = op_name(node)
    counts[operator] += 1
    number = counts[operator] - 1
    return f"{operator}_{number}" if number else operator


def _call(node: fx.Node, names: dict[fx.Node, str]) -> str:
    shown = [_show(argument, names) for argument in node.args]
    shown += [f"{key}={_show(value, names)}" for key, value in node.kwargs.items()]
    operator = str(node.target) if node.op == "call_module" else op_name(node)
    return f"{operator}({', '.join(shown)})"


def _show(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(_show(item, names) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {_show(v, names)}' for k, v in value.items())}}}"
    return f"{value:g}" if isinstance(value, float) else str(value)
