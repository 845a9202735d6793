"""How far eager is off the numbers that it rounds: a model of half precision, run in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lora_fx.export.program.shape_variants import Case
from lora_fx.export.report import Reference
from lora_fx.export.verification.eager import Tensors, run_eager
from lora_fx.numerics import TOLERANCE, compare

HALF = (torch.float16, torch.bfloat16)
_TWO = 2  # the file rounds as much as eager does
_MOST = 2e-2  # below what a scale off by a tenth makes: 2.6e-2 in float16, 3.8e-2 in bfloat16


def tolerances(
    subject: Reference, case: Case, expected: Tensors, dtype: torch.dtype
) -> list[float]:
    """The relative error that each output of a model of half precision is allowed.

    Rounding adds up from layer to layer, so eager of a deep model may be farther off the numbers
    that it rounds than the table allows, and a file that rounds elsewhere is no worse.
    """
    allowed = [TOLERANCE[dtype] if number.is_floating_point() else 0.0 for number in expected]
    exact = _in_float32(subject, case)
    if len(exact) != len(expected):
        return allowed
    pairs = zip(expected, exact, allowed, strict=True)
    return [widened(compare(number, one).relative, least) for number, one, least in pairs]


def widened(rounding: float, allowed: float) -> float:
    """Whole numbers, which are allowed nothing, are not rounded."""
    wider = _TWO * rounding
    return wider if 0 < allowed < wider < _MOST else allowed


def _in_float32(subject: Reference, case: Case) -> Sequence[torch.Tensor]:
    """What a model gives without the rounding of half precision; nothing if its code has none."""
    wide = replace(case, args=_wide(case.args), kwargs=_wide(dict(case.kwargs)))
    try:
        with _Operators(), _Functions():  # type: ignore[no-untyped-call]
            return run_eager(subject.eager, wide)
    except Exception:  # code that wants the type that it was written for may raise anything
        return []


class _Functions(TorchFunctionMode):
    """Gives float32 to functions, some of which want all they take to be of one type."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # One of such a name writes, or reads an attribute.
        return _called(func, args, kwargs, as_it_is=func.__name__.endswith("_"))


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs each operator in float32 that would run in half precision."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # What is written to stays the tensor that it is.
        return _called(func, args, kwargs, as_it_is=func._schema.is_mutable)


def _called(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, as_it_is: bool
) -> Any:
    given = args, dict(kwargs or {})
    args, named = given if as_it_is else _wide(given)
    return func(*args, **named)


def _wide(tree: Any) -> Any:
    return pytree.tree_map(_wide_leaf, tree)


def _wide_leaf(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.float() if leaf.dtype in HALF else leaf
    return torch.float32 if leaf in HALF else leaf
