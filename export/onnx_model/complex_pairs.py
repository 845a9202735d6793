"""Complex numbers as pairs of real ones, for operators that torch.onnx translates of these alone.

``pad(z, [1, 2])`` -> ``view_as_complex(pad(view_as_real(z), [0, 0, 1, 2]))``: what moves or picks
does so with pairs, and a product is four of parts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from lora_fx.export.program.decompose import LoweredProgram, decompose
from lora_fx.graph.ops import aten, mutates

_PADS = (aten.pad.default, aten.constant_pad_nd.default)
# Of pairs, (*sizes, 2), and the rest of what the operator takes.
_MOVES: dict[Any, Callable[..., Any]] = {
    aten.alias.default: lambda z: z,
    aten.copy.default: lambda z, source, *_: source.expand_as(z),
    aten.expand.default: lambda z, sizes: z.expand(*sizes, 2),
    aten.index.Tensor: lambda z, places: aten.index(z, places),
    aten.select.int: lambda z, axis, place: z.select(_axis(z, axis), place),
    aten.select_scatter.default: lambda z, part, axis, place: torch.select_scatter(
        z, part, _axis(z, axis), place
    ),
    aten.slice_scatter.default: lambda z, part, axis=0, *rest: torch.slice_scatter(
        z, part, _axis(z, axis), *rest
    ),
    aten.unsqueeze.default: lambda z, axis: z.unsqueeze(axis % z.ndim),
    **dict.fromkeys(_PADS, lambda z, pads, *_: aten.pad(z, [0, 0, *pads])),
}
_PRODUCTS: dict[Any, Callable[..., Any]] = {
    aten.bmm.default: torch.bmm,
    aten.einsum.default: torch.einsum,
    aten.matmul.default: torch.matmul,
    aten.mm.default: torch.mm,
}


def writes_complex(program: torch.export.ExportedProgram) -> bool:
    """Whether complex numbers are written in place, which `as_pairs` has no operators for."""
    is_lowered = isinstance(program, LoweredProgram)
    return not is_lowered and any(_is_complex(n) and mutates(n) for n in program.graph.nodes)


def as_pairs(program: torch.export.ExportedProgram) -> None:
    """Says operators of complex numbers with pairs of real ones, in place."""
    with enable_python_dispatcher():  # without it a pad makes constants of free sizes
        for node in [node for node in program.graph.nodes if _is_complex(node)]:
            if (function := _on_pairs(node)) is not None:
                decompose(node, function)
    program.graph_module.recompile()


def _is_complex(node: fx.Node) -> bool:
    return _has_pairs(node.meta.get("val"))


def _on_pairs(node: fx.Node) -> Callable[..., Any] | None:
    """What gives the numbers of a call by operators of real ones; None: it stays."""
    target: Any = node.target
    if target is aten.zeros.default:
        return partial(_zeros, node.meta["val"].real.dtype)
    tensors = [n for n in node.args if isinstance(n, fx.Node) and _is_tensor(n)]
    if node.kwargs or not all(map(_is_complex, tensors)):
        return None
    if target in _PRODUCTS and len(node.all_input_nodes) == 2:
        return partial(_product, _PRODUCTS[target])
    is_zero = target not in _PADS or node.args[2:] in ((), ("constant",), (0,), (0.0,))
    return partial(_moved, _MOVES[target]) if target in _MOVES and is_zero else None


def _moved(move: Callable[..., Any], *args: Any) -> torch.Tensor:
    given = (torch.view_as_real(value) if _has_pairs(value) else value for value in args)
    return torch.view_as_complex(move(*given))


def _zeros(real: torch.dtype, sizes: Any, **_: Any) -> torch.Tensor:
    return torch.view_as_complex(torch.zeros(*sizes, 2, dtype=real))


def _product(multiply: Callable[..., Any], *args: Any) -> torch.Tensor:
    *equation, one, two = [*args[:-1], *args[-1]] if isinstance(args[-1], list) else args
    (a, b), (c, d) = _parts(one), _parts(two)
    real = multiply(*equation, a, c) - multiply(*equation, b, d)
    imag = multiply(*equation, a, d) + multiply(*equation, b, c)
    return torch.view_as_complex(torch.stack((real, imag), -1))


def _parts(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = torch.view_as_real(value)
    return pairs.select(-1, 0), pairs.select(-1, 1)


def _has_pairs(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_complex()


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _axis(pairs: torch.Tensor, axis: int) -> int:
    return axis % (pairs.ndim - 1)
