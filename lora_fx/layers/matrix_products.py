"""Products with one matrix, however they are spelled: ``x @ w``, ``mm``, ``bmm``, ``einsum``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import getitem
from typing import Any

import torch
from torch import fx

from lora_fx.graph.ops import aten, call_argument, op_name
from lora_fx.layers.weight_parts import calls_of

_UNBIASED = {aten.addmm.default: aten.mm.default, aten.baddbmm.default: aten.bmm.default}
_STEPS = 200  # nodes that a matrix may be made of, an adapter's function of a weight included
_BATCHES = {"unsqueeze", "expand", "repeat", "broadcast_to"}  # give a matrix a batch
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


Place = tuple[int, ...]  # of an argument: its number, and in a list its number there


@dataclass(frozen=True)
class Labels:
    """Where a call keeps its features, if not on the last axis, as einsum writes it.

    Attributes:
        of_x: the axes of x, ``bin``.
        output: the axes of the result, ``bon``.
        summed: the letter of the features of x.
        new: that of the features of the result.
    """

    of_x: str
    output: str
    summed: str
    new: str

    @property
    def before(self) -> int:
        """How many axes of x are behind its features."""
        return len(self.of_x) - 1 - self.of_x.index(self.summed)

    @property
    def behind(self) -> int:
        """How many axes of the result are behind its features."""
        return len(self.output) - 1 - self.output.index(self.new)

    def shrink(self) -> str:
        """The equation of x and (in, r)."""
        rank = self._rank()
        return _spelled(f"{self.of_x},{self.summed}{rank}->{self.output.replace(self.new, rank)}")

    def expand(self) -> str:
        """The equation of r features and (r, out)."""
        rank = self._rank()
        return _spelled(f"{self.output.replace(self.new, rank)},{rank}{self.new}->{self.output}")

    def _rank(self) -> str:
        return next(n for n in _LETTERS if n not in {*self.of_x, *self.output})


@dataclass(frozen=True)
class Product:
    """A call that multiplies its input with one constant matrix.

    Attributes:
        x: the input.
        operand: what it is multiplied with, which may have a batch.
        matrix: the operand without one, of two axes.
        turned: whether the matrix is (out, in).
        bias: what is added, or None.
        labels: where features are; None for the last axis of x and of the result.
        at: where the call has x, and where the operand.
        batches: the calls that give the matrix its batch, in order.
    """

    x: fx.Node
    operand: fx.Node
    matrix: fx.Node
    turned: bool
    at: tuple[Place, Place]
    bias: fx.Node | None = None
    labels: Labels | None = None
    batches: tuple[fx.Node, ...] = ()

    def again(
        self, call: fx.Node, x: fx.Node, operand: fx.Node, bias: fx.Node | None
    ) -> tuple[Any, tuple[Any, ...]]:
        """The same call of other operands; the bias is left out where it has no place for one."""
        if call.target is aten.linear.default:
            return call.target, (x, operand) if bias is None else (x, operand, bias)
        if call.target in _UNBIASED and bias is None:
            return _UNBIASED[call.target], (x, operand)
        if call.target in _UNBIASED:
            return call.target, (bias, x, operand)
        new = {self.x: x, self.operand: operand}
        arguments: Any = fx.node.map_arg(call.args, lambda node: new.get(node, node))
        return call.target, arguments


def product_of(node: fx.Node) -> Product | None:
    """Reads a call in normal form, or None if it is no product with one constant matrix."""
    read = _READERS.get(node.target)
    return read(node) if read is not None and not node.kwargs else None


def has_factors(node: fx.Node) -> bool:
    """Whether a call is ``beta b + alpha x @ w``: no layer, for an adapter knows no such factor."""
    is_sum = op_name(node) in ("addmm", "baddbmm")
    return is_sum and (len(node.args) != 3 or bool(node.kwargs))


def is_fixed(value: Any) -> bool:
    """Whether a node is a stored tensor, or computed from such alone."""
    return isinstance(value, fx.Node) and (
        value.op == "get_attr" or bool(calls_of(value, most=_STEPS))
    )


def rank_of(node: object) -> int | None:
    """How many axes a node was traced with."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.ndim if isinstance(value, torch.Tensor) else None


def listed(x: Any, own: str, of_x: str, output: str) -> tuple[str, str]:
    """The labels of x and the result with a letter for each axis of ``.``, if these are known."""
    rank = rank_of(x) if isinstance(x, fx.Node) else None
    free = [n for n in _LETTERS if n not in {*own, *of_x, *output}]
    rest = "." if rank is None else "".join(free[: rank + 1 - len(of_x)])
    return of_x.replace(".", rest), output.replace(".", rest)


def _linear(node: fx.Node) -> Product | None:
    bias = call_argument(node, 2, "bias")
    return _made(node, ((0,), (1,)), turned=True, bias=bias)


def _matmul(node: fx.Node) -> Product | None:
    found = _made(node, ((0,), (1,)), turned=False)
    if found is not None:
        return found
    is_vector = rank_of(node.args[1]) == 1
    labels = None if is_vector else Labels(".in", ".on", "i", "o")
    return _made(node, ((1,), (0,)), turned=True, labels=labels)


def _biased(node: fx.Node) -> Product | None:
    return None if has_factors(node) else _made(node, ((1,), (2,)), False, bias=node.args[0])


def _einsum(node: fx.Node) -> Product | None:
    args: Any = node.args
    equation, operands = str(args[0]).replace(" ", "").replace("...", "."), args[1]
    inputs, arrow, output = equation.partition("->")
    labels = inputs.split(",")
    if not isinstance(operands, list | tuple) or not len(operands) == len(labels) == 2:
        return None
    output = output if arrow else _implied(labels)
    place = 1 if is_fixed(operands[1]) else 0
    own, of_x = labels[place], labels[1 - place]
    found = _labels(own, of_x, output) or _labels(
        own, *listed(operands[1 - place], own, of_x, output)
    )
    if found is None:
        return None
    turned = own[0] == found.new
    return _made(node, ((1, 1 - place), (1, place)), turned, labels=_placed(found))


def _tensordot(node: fx.Node) -> Product | None:
    args: Any = node.args
    one, two, *dims = args
    if len(dims) != 2 or any(len(axes) != 1 for axes in dims):
        return None
    place = 1 if is_fixed(two) else 0
    axis, own = dims[1 - place][0], dims[place][0] % 2
    rank = rank_of(two if place == 0 else one)
    if rank is None and (axis != -1 or place == 0):
        return None
    batch = "." if rank is None else _LETTERS[: rank - 1].replace("i", "Y").replace("o", "Z")
    at = len(batch) if axis == -1 else axis % (rank or 1)
    output = f"{batch}o" if place == 1 else f"o{batch}"
    labels = Labels(f"{batch[:at]}i{batch[at:]}", output, "i", "o")
    return _made(node, ((1 - place,), (place,)), own == 1, labels=_placed(labels))


def _made(
    node: fx.Node,
    at: tuple[Place, Place],
    turned: bool,
    bias: Any = None,
    labels: Labels | None = None,
) -> Product | None:
    arguments: Any = node.args
    x, operand = (reduce(getitem, place, arguments) for place in at)
    if not isinstance(x, fx.Node) or not isinstance(operand, fx.Node):
        return None
    batches = _batches(x, operand)
    matrix = batches[0].all_input_nodes[0] if batches else operand
    if not is_fixed(matrix) or is_fixed(x):
        return None
    if bias is not None and not isinstance(bias, fx.Node):
        return None
    return Product(x, operand, matrix, turned, at, bias, labels, batches)


def _batches(x: fx.Node, operand: fx.Node) -> tuple[fx.Node, ...]:
    """The calls that repeat a matrix for each of a batch that x has too, in order."""
    calls: list[fx.Node] = []
    node = operand
    while op_name(node) in _BATCHES and isinstance(node.args[0], fx.Node):
        if op_name(node) == "unsqueeze" and call_argument(node, 1, "dim") != 0:
            return ()
        calls.insert(0, node)
        node = node.args[0]
    if not calls:  # as of almost every product
        return ()
    users = {op_name(user) for user in operand.users}
    has_batch = users <= {"bmm", "baddbmm"} or (rank_of(x) or 0) >= 3
    return tuple(calls) if has_batch else ()


def _spelled(equation: str) -> str:
    return equation.replace(".", "...")


def _implied(labels: list[str]) -> str:
    """The output of an equation that names none: letters that occur once, in order."""
    every = "".join(labels)
    return "." * ("." in every) + "".join(sorted(n for n in set(every) if every.count(n) == 1))


def _labels(own: str, of_x: str, output: str) -> Labels | None:
    """The labels of an equation that sums one letter of x with a matrix of two, for a new one."""
    if any(len(set(labels)) < len(labels) for labels in (own, of_x, output)) or len(own) != 2:
        return None
    summed = [n for n in own if n in of_x and n not in output]
    new = [n for n in own if n in output]
    if len(summed) != 1 or len(new) != 1 or set(of_x) - {*summed} != set(output) - {*new}:
        return None
    found = Labels(of_x, output, summed[0], new[0])
    behind = of_x[len(of_x) - found.before :] + output[len(output) - found.behind :]
    return None if "." in behind else found  # how many axes these are is not known


def _placed(labels: Labels) -> Labels | None:
    """None for what is the last axis on both sides."""
    is_plain = labels.before == labels.behind == 0 and labels.of_x[:-1] == labels.output[:-1]
    return None if is_plain else labels


_READERS: dict[Any, Any] = {
    aten.linear.default: _linear,
    aten.addmm.default: _biased,
    aten.baddbmm.default: _biased,
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.einsum.default: _einsum,
    aten.tensordot.default: _tensordot,
}
