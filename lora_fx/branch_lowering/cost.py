"""What a layer with a low-rank update costs in each form: FLOPs, bytes and calls, from shapes.

A layer takes n rows of d features to o, with an update of rank r; its weight is read once and
each activation is read and written once a call. The formulas are counts of the definition
``x W + (x A) B + b`` (Hu et al., LoRA, arXiv:2106.09685, section 4.1), term by term. The three
constants that make one number of them are of onnxruntime's CPU kernels and can be measured again
with ``benchmarks/pieces.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def product(n: int, d: int, o: int, size: int) -> Cost:
    """``(n, d) @ (d, o)``; what is narrower than a panel costs a panel."""
    wide = -(-o // PANEL) * PANEL
    return Cost(2.0 * n * d * wide, float(size * (d * o + n * (d + o))), 1)


def moved(elements: int, size: int) -> Cost:
    """A call that reads and writes this many elements in all."""
    return Cost(0.0, float(size * elements), 1)


def bias(shape: Shape) -> Cost:
    """``y + b``, in place."""
    return moved(2 * shape.n * shape.o, shape.size) if shape.biased else Cost()


def merged(shape: Shape) -> Cost:
    """``x W + b``."""
    return product(shape.n, shape.d, shape.o, shape.size) + bias(shape)


def shrink(shape: Shape, rank: int | None = None, ones: bool = False) -> Cost:
    """``x A``, of this rank or another; ``ones`` adds a vector that makes a column of ones."""
    rank = shape.r if rank is None else rank
    made = product(shape.n, shape.d, rank, shape.size)
    return made + moved(2 * shape.n * rank, shape.size) if ones else made


def factored(shape: Shape, ones: bool = False) -> Cost:
    """``x W + b + h B`` from ``h = x A``; with ``ones`` the bias is a row of B."""
    n, o, rank = shape.n, shape.o, shape.r + ones
    base = product(n, shape.d, o, shape.size) + (Cost() if ones else bias(shape))
    return base + product(n, rank, o, shape.size) + moved(3 * n * o, shape.size)


def augmented(shape: Shape, ones: bool = False) -> Cost:
    """``concat(x, h) @ [W; B] + b`` from ``h = x A``; with ``ones`` the bias is a row as well."""
    wide = shape.d + shape.r + ones
    joined = moved(2 * shape.n * wide, shape.size)
    return joined + product(shape.n, wide, shape.o, shape.size) + (Cost() if ones else bias(shape))


def weight(shape: Shape) -> Cost:
    """``x (W + A B) + b`` with a weight that is made, and laid out for the kernel, at each call."""
    d, o, r, size = shape.d, shape.o, shape.r, shape.size
    return product(d, r, o, size) + moved(3 * d * o, size) + moved(2 * d * o, size) + merged(shape)
