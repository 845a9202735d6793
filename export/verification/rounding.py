"""How far eager is off the numbers that it rounds: a model, run in a wider type than its own."""

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

# By type: the wider one, how many times eager's rounding is allowed (in half precision the file
# rounds as much; the order of a sum, which is all that float32 shows, differs by more), and what is
# too much, below what a scale off by a tenth makes: 2.6e-2 in float16, 3.6e-2 in the others.
_HALF = (torch.float32, 2.0, 2e-2)
WIDER = {
    torch.float16: _HALF,
    torch.bfloat16: _HALF,
    torch.float32: (torch.float64, 10.0, 2e-4),
}


def tolerances(
    subject: Reference, case: Case, expected: Tensors, dtype: torch.dtype
) -> list[float]:
    """The relative error that each output of a model is allowed.

    Rounding adds up from layer to layer, and sharp attention or a norm of almost equal numbers
    makes much of it, so eager may be farther off the numbers that it rounds than the table allows,
    and a file that rounds elsewhere is no worse.
    """
    allowed = [TOLERANCE[dtype] if number.is_floating_point() else 0.0 for number in expected]
    exact = _in_wider(subject, case, dtype)
    if len(exact) != len(expected):
        return allowed
    pairs = zip(expected, exact, allowed, strict=True)
    return [widened(compare(number, one).relative, least, dtype) for number, one, least in pairs]


def widened(rounding: float, allowed: float, dtype: torch.dtype) -> float:
    """Whole numbers, which are allowed nothing, are not rounded."""
    _, times, most = WIDER[dtype]
    wider = times * rounding
    return wider if 0 < allowed < wider < most else allowed


def _in_wider(subject: Reference, case: Case, dtype: torch.dtype) -> Sequence[torch.Tensor]:
    """What a model gives without the rounding of its type; nothing if its code has none."""
    wider = WIDER[dtype][0]
    wide = _Wide({narrow: wider for narrow, (to, *_) in WIDER.items() if to is wider})
    case = replace(case, args=wide.of(case.args), kwargs=wide.of(dict(case.kwargs)))
    try:
        with _Operators(wide), _Functions(wide):
            return run_eager(subject.eager, case)
    except Exception:  # code that wants the type that it was written for may raise anything
        return []


class _Wide:
    """Calls in wider types: from type -> to type."""

    def __init__(self, types: Mapping[torch.dtype, torch.dtype]) -> None:
        self._types = types

    def of(self, tree: Any) -> Any:
        return pytree.tree_map(self._leaf, tree)

    def _leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf.to(self._types.get(leaf.dtype, leaf.dtype))
        return self._types.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf

    def called(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, as_it_is: bool
    ) -> Any:
        given = args, dict(kwargs or {})
        args, named = given if as_it_is else self.of(given)
        return func(*args, **named)


class _Functions(TorchFunctionMode):
    """Gives the wider type to functions, some of which want all they take to be of one type."""

    def __init__(self, wide: _Wide) -> None:
        super().__init__()
        self._wide = wide

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # One of such a name writes, or reads an attribute.
        return self._wide.called(func, args, kwargs, as_it_is=func.__name__.endswith("_"))


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs each operator in the wider type that would run in the other."""

    def __init__(self, wide: _Wide) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._wide = wide

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # What is written to stays the tensor that it is.
        return self._wide.called(func, args, kwargs, as_it_is=func._schema.is_mutable)
