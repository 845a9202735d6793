"""What a form of a layer costs: FLOPs, bytes and calls, counted over a trace of it.

A layer takes n rows of d features to o, with an update of rank r. Each operator of the trace reads
what it is given and writes what it gives, once; what is computed from constants alone costs
nothing. The three constants that make one number of the counts are of onnxruntime's CPU kernels
and can be measured again with ``benchmarks/pieces.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from lora_fx.branch_lowering import forms
from lora_fx.graph.ops import aten, function_name

BYTE_FLOPS = 4.0  # a core with 200 GFLOP/s moves activations at 50 to 90 GB/s
CALL_FLOPS = 1e5  # up to half a microsecond for each call of an operator
PANEL = 16  # columns that a matrix kernel computes together: a narrow product costs a whole panel


@dataclass(frozen=True)
class Cost:
    """What some calls cost.

    Attributes:
        flops: multiplications and additions.
        bytes: read and written.
        calls: of operators.
    """

    flops: float = 0.0
    bytes: float = 0.0
    calls: int = 0

    def __add__(self, other: Cost) -> Cost:
        """Both, one after the other."""
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.calls + other.calls)

    def __sub__(self, other: Cost) -> Cost:
        """What one costs more than the other."""
        return self + Cost(-other.flops, -other.bytes, -other.calls)

    @property
    def work(self) -> float:
        """One number to compare by: FLOPs that take as long."""
        return self.flops + BYTE_FLOPS * self.bytes + CALL_FLOPS * self.calls

    def __str__(self) -> str:
        """In MFLOP and MB."""
        return f"{self.flops / 1e6:.3g} MFLOP, {self.bytes / 1e6:.3g} MB, {self.calls} calls"


@dataclass(frozen=True)
class LayerShape:
    """The sizes of one call of a layer with an update.

    Attributes:
        n: rows of x, all leading axes as one.
        d: features of x.
        o: features of the result.
        r: rank.
        size: bytes of an element.
        biased: whether the layer has a bias.
    """

    n: int
    d: int
    o: int
    r: int
    size: int = 4
    biased: bool = True

    @property
    def rho(self) -> float:
        """``r (d + o) / (d o)``: what no form can save, over what the merged layer costs."""
        return self.r * (self.d + self.o) / (self.d * self.o)


@cache
def cost_of(
    form: forms.FormFunction, shape: LayerShape, ones: bool = False, slots: bool = False
) -> Cost:
    """What a form costs, but for the product that makes its ``narrow``.

    Args:
        form: as `forms` has them.
        shape: of the layer.
        ones: whether the bias is a row of B.
        slots: whether A and B are given at each call.
    """
    rank = shape.r + ones
    x, narrow = sized(shape.n, shape.d), sized(shape.n, rank)
    weight, matrix = sized(shape.o, shape.d), sized(shape.d, shape.o)
    bias = sized(shape.o) if shape.biased and not ones else None
    down, up = sized(shape.d, shape.r), sized(rank, shape.o)
    constants = [weight, matrix, bias] if slots else [weight, matrix, bias, down, up]
    given = {"x": x, "weight": weight, "matrix": matrix, "bias": bias, "narrow": narrow}
    counter = Counter(_tensors(constants), shape.size)
    with counter:
        if "base" in forms.operands_of(form):
            given["base"] = forms.merged(x, weight, bias)
        given |= {"down": down, "up": up}
        form(**{name: given[name] for name in forms.operands_of(form)})
    return counter.total


@cache
def cost_of_shrink(shape: LayerShape, widths: tuple[int, ...], ones: bool = False) -> Cost:
    """What it costs to make the ``narrow`` of layers that read one x, of so many columns each."""
    downs = [sized(shape.d, width) for width in widths]
    column = sized(sum(widths)) if ones else None
    counter = Counter([*downs, *_tensors(column)], shape.size)
    with counter:
        forms.shrink(sized(shape.n, shape.d), downs, column, widths)
    return counter.total


def product(n: int, d: int, o: int, size: int) -> Cost:
    """``(n, d) @ (d, o)``; what is narrower than a panel costs a panel."""
    wide = -(-o // PANEL) * PANEL
    return Cost(2.0 * n * d * wide, float(size * (d * o + n * (d + o))), 1)


def moved(elements: int, size: int) -> Cost:
    """A call that reads and writes this many elements in all."""
    return Cost(0.0, float(size * elements), 1)


class Counter(TorchFunctionMode):
    """Adds up the calls that are made under it, but for those that read constants alone."""

    def __init__(self, constants: Sequence[torch.Tensor], size: int) -> None:
        super().__init__()
        self.total, self._size = Cost(), size
        self._constants, self._made = list(constants), list[torch.Tensor]()

    def __torch_function__(
        self, call: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs a call, on tensors without data."""
        result = call(*args, **(kwargs or {}))
        if not isinstance(call, torch._ops.OpOverload):
            return result
        if all(_is_in(read, self._constants) for read in _tensors(args)):
            self._constants += _tensors(result)
            return result
        self._made += _tensors(result)
        self.total += self._cost(call, args, result)
        return result

    def _cost(self, call: torch._ops.OpOverload, args: tuple[Any, ...], result: Any) -> Cost:
        name = function_name(call)
        if name in ("linear", "matmul") and args[1].ndim == 2:
            x, weight, *bias = args
            d, o = weight.shape if name == "matmul" else weight.shape[::-1]
            cost = product(x.numel() // d, d, o, self._size)
            if _is_in(weight, self._made):  # it is laid out for the kernel at each call
                cost += moved(2 * d * o, self._size)
            return cost + (moved(2 * result.numel(), self._size) if bias else Cost())
        wrote = _tensors(result)
        if not wrote or (call.is_view and name != "split_with_sizes"):  # a size, or a view
            return Cost()
        if name in ("embedding", "index_select"):  # rows of a table, read once each
            return moved(2 * result.numel(), self._size)
        read = [value for value in _tensors(args) if value.ndim == wrote[0].ndim]  # not broadcast
        elements = sum(value.numel() for value in (*wrote, *read))
        return Cost(_flops(call, args)) + moved(elements, self._size)


def _flops(call: torch._ops.OpOverload, args: tuple[Any, ...]) -> float:
    """Multiplications and additions of what may be a product of several tensors."""
    if torch.Tag.pointwise in call.tags or call is aten.cat.default or len(_tensors(args)) < 2:
        return 0.0
    with FlopCounterMode(display=False) as counted:
        call(*args)
    return float(counted.get_total_flops())


def sized(*sizes: int) -> torch.Tensor:
    """A tensor without data."""
    return torch.empty(sizes, device="meta")


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, torch.Tensor)]


def _is_in(value: torch.Tensor, values: Sequence[torch.Tensor]) -> bool:
    return any(value is other for other in values)
