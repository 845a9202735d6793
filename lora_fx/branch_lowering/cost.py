"""What a form of a layer costs: FLOPs, bytes and calls, counted over a trace of it.

A layer takes n rows of d features to o, with an update of rank r. Each operator of the trace reads
what it is given and writes what it gives, once; what is computed from constants alone costs
nothing. The three constants that make one number of the counts are of onnxruntime's CPU kernels
and can be measured again with ``benchmarks/pieces.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lora_fx.branch_lowering import forms
from lora_fx.graph.ops import op_name

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

    @property
    def work(self) -> float:
        """One number to compare by: FLOPs that take as long."""
        return self.flops + BYTE_FLOPS * self.bytes + CALL_FLOPS * self.calls

    def __str__(self) -> str:
        """In MFLOP and MB."""
        return f"{self.flops / 1e6:.3g} MFLOP, {self.bytes / 1e6:.3g} MB, {self.calls} calls"


@dataclass(frozen=True)
class Shape:
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
    function: forms.FormFunction, shape: Shape, ones: bool = False, slots: bool = False
) -> Cost:
    """What a form costs, but for the product that makes its ``narrow``.

    Args:
        function: as `forms` has them.
        shape: of the layer.
        ones: whether the bias is a row of B.
        slots: whether A and B are given at each call.
    """
    rank, is_biased = shape.r + ones, shape.biased and not ones
    given = {
        "x": _meta(shape.n, shape.d),
        "weight": _meta(shape.o, shape.d),
        "matrix": _meta(shape.d, shape.o),
        "bias": _meta(shape.o) if is_biased else None,
        "narrow": _meta(shape.n, rank),
        "down": _meta(shape.d, shape.r),
        "up": _meta(rank, shape.o),
    }
    fixed = {"weight", "matrix", "bias", *(() if slots else ("down", "up"))}
    taken = {name: given[name] for name in forms.operands_of(function)}
    return _counted(function, taken, fixed, shape.size)


@cache
def cost_of_shrink(shape: Shape, widths: tuple[int, ...], ones: bool = False) -> Cost:
    """What it costs to make the ``narrow`` of layers that read one x, of so many columns each."""
    given = {
        "x": _meta(shape.n, shape.d),
        "downs": [_meta(shape.d, width) for width in widths],
        "ones": _meta(sum(widths)) if ones else None,
    }
    return _counted(partial(forms.shrink, widths=widths), given, {"downs", "ones"}, shape.size)


def product(n: int, d: int, o: int, size: int) -> Cost:
    """``(n, d) @ (d, o)``; what is narrower than a panel costs a panel."""
    wide = -(-o // PANEL) * PANEL
    return Cost(2.0 * n * d * wide, float(size * (d * o + n * (d + o))), 1)


def moved(elements: int, size: int) -> Cost:
    """A call that reads and writes this many elements in all."""
    return Cost(0.0, float(size * elements), 1)


def _meta(*sizes: int) -> torch.Tensor:
    return torch.empty(sizes, device="meta")


def _counted(
    function: Callable[..., Any], operands: Mapping[str, Any], fixed: Collection[str], size: int
) -> Cost:
    """The sum over the calls of a function that read more than fixed operands."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)

    def proxy(name: str, value: torch.Tensor) -> fx.Proxy:
        node = graph.placeholder(name)
        node.meta.update(val=value, fixed=name in fixed)
        return fx.Proxy(node, tracer)

    function(
        **{
            name: pytree.tree_map_only(torch.Tensor, partial(proxy, name), value)
            for name, value in operands.items()
        }
    )
    total = Cost()
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        node.meta["val"] = node.target(*arguments[0], **arguments[1])
        node.meta["fixed"] = all(source.meta["fixed"] for source in node.all_input_nodes)
        if not node.meta["fixed"]:
            total += _cost(node, size)
    return total


def _cost(node: fx.Node, size: int) -> Cost:
    if op_name(node) == "linear":
        x, weight, *bias = node.args
        return _product(x, weight, size, 1) + (moved(2 * _count(node), size) if bias else Cost())
    if op_name(node) == "matmul":
        return _product(*node.args, size, 0)
    if op_name(node) == "getitem" or (
        _is_view(node.target) and op_name(node) != "split_with_sizes"
    ):
        return Cost()
    axes = pytree.tree_leaves(node.meta["val"])[0].ndim
    read = [source for source in node.all_input_nodes if source.meta["val"].ndim == axes]
    return moved(_count(node) + sum(map(_count, read)), size)  # but for what is broadcast


def _product(x: Any, weight: Any, size: int, axis: int) -> Cost:
    """A product with a weight; one that is made at each call is laid out for the kernel first."""
    d, o = weight.meta["val"].shape[axis], weight.meta["val"].shape[1 - axis]
    is_made = weight.op == "call_function" and not weight.meta["fixed"]
    laid_out = moved(2 * d * o, size) if is_made else Cost()
    return product(_count(x) // d, d, o, size) + laid_out


def _is_view(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.is_view


def _count(node: fx.Node) -> int:
    return sum(value.numel() for value in pytree.tree_leaves(node.meta["val"]))
