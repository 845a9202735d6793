"""The forms that a layer with a low-rank update is computed in: functions of tensors.

A form takes what it names of these, and gives ``x W + b + (x A) B``:

    x       (..., in), what the layer reads      base    (..., out), x W + b
    weight  (out, in), W                         narrow  (..., r), x A
    matrix  (in, out), W as x meets it           down    (in, r), A
    bias    (out,), b, or None                   up      (r, out), B, the scale in it

What it costs is found by tracing it (`cost.py`), and it is written into a graph as it stands, with
what it makes of constants alone made once (`emit_form.py`). Layers whose forms take ``narrow`` may
share the product that makes it, and have their bias as a row of B. Products are to be ``linear`` or
``matmul``: any other operator is counted as a pass over memory, and a view as nothing.

To add a form, write it here and name it in `CONSTANT`, or in `SLOTS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from lora_fx.graph.ops import aten

FormFunction = Callable[..., Any]


def merged(x: Any, weight: Any, bias: Any) -> Any:
    """``x W + b``."""
    given = (x, weight) if bias is None else (x, weight, bias)
    return aten.linear.default(*given)


def factored(base: Any, narrow: Any, up: Any) -> Any:
    """``(x W + b) + (x A) B``."""
    return aten.add.Tensor(base, aten.matmul.default(narrow, up))


def augmented(x: Any, weight: Any, bias: Any, narrow: Any, up: Any) -> Any:
    """``concat(x, x A) [W; B] + b``."""
    stacked = aten.cat.default([weight, aten.t.default(up)], 1)
    return merged(aten.cat.default([x, narrow], -1), stacked, bias)


def made(x: Any, matrix: Any, bias: Any, down: Any, up: Any) -> Any:
    """``x (W + A B) + b``, with a weight that is made at each call."""
    y = aten.matmul.default(x, aten.add.Tensor(matrix, aten.matmul.default(down, up)))
    return y if bias is None else aten.add.Tensor(y, bias)


# Forms by name: for A and B that are constants, and for those that are given at each call.
CONSTANT: dict[str, FormFunction] = {
    "factored": factored,
    "augmented": augmented,
}
SLOTS: dict[str, FormFunction] = {
    "factored": factored,
    "weight": made,
}


def shrink(x: Any, downs: Sequence[Any], ones: Any, widths: Sequence[int]) -> list[Any]:
    """``x A`` of one layer or several: one product, cut into columns as wide as each wants.

    Args:
        x: what the layers read.
        downs: the A of all their branches.
        ones: (r,), what is added to each row, or None: a column of ones meets a bias in B.
        widths: columns of each layer.
    """
    narrow = aten.matmul.default(x, aten.cat.default(list(downs), 1))
    if ones is not None:
        narrow = aten.add.Tensor(narrow, ones)
    if len(widths) == 1:
        return [narrow]
    parts = aten.split_with_sizes.default(narrow, list(widths), -1)
    return [parts[place] for place in range(len(widths))]


@cache
def operands_of(form: FormFunction) -> tuple[str, ...]:
    """What a form takes, by name."""
    return tuple(inspect.signature(form).parameters)
