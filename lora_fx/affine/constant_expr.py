"""Constants that are computed from smaller ones, as expressions of those.

``x @ (a @ b).T`` multiplies with a matrix of full size; the factors say that its rank is low.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from lora_fx.algebra.matrix_expr import Leaf, Matrix, Sum, product, signed, transposed
from lora_fx.graph.constants import Constants
from lora_fx.graph.ops import call_argument, op_name

_TURNS = {"t", "T", "numpy_T", "mT", "adjoint"}
_PASSES = {"to", "float", "double", "clone", "contiguous", "detach", "alias", "_to_copy"}


def factored(constants: Constants, node: fx.Node) -> Matrix | None:
    """A constant of two axes as an expression, or None if it has not two."""
    shape = constants.shape(node)
    if shape is None or len(shape) != 2:
        return None
    found = None if constants.is_long(node) else _expression(constants, node)
    return found or leaf(constants, node, (shape[0], shape[1]))


def leaf(constants: Constants, node: fx.Node, shape: tuple[int, int]) -> Leaf:
    """A constant, reshaped to a matrix."""
    return Leaf(shape, constants.key(node), lambda: constants.value(node))


def _expression(constants: Constants, node: fx.Node) -> Matrix | None:
    first, second = call_argument(node, 0, "input"), call_argument(node, 1, "other")
    if op_name(node) == "mul" and isinstance(first, int | float):
        first, second = second, first
    one = _matrix(constants, first)
    if one is None or node.op == "get_attr":
        return None
    name = op_name(node)
    if name in _PASSES:
        return one if constants.dtype(node).is_floating_point else None
    if name in _TURNS or (name == "getattr" and second in _TURNS) or _swaps(name, node):
        return transposed(one)
    if name in ("mul", "div", "truediv") and isinstance(second, int | float) and second != 0:
        return signed(one, float(second) if name == "mul" else 1 / second)
    other = _matrix(constants, second)
    if other is None:
        return None
    if name in ("matmul", "mm"):
        return product(one, other)
    if name in ("add", "sub") and one.shape == other.shape and not node.kwargs:
        return Sum(one, signed(other, 1 if name == "add" else -1))
    return None


def _matrix(constants: Constants, value: Any) -> Matrix | None:
    known = isinstance(value, fx.Node) and value in constants.nodes
    if not known or not constants.is_floating(value):
        return None
    return factored(constants, value)


def _swaps(name: str, node: fx.Node) -> bool:
    rest = node.args[1:]
    if name in ("transpose", "swapaxes", "swapdims"):
        return len(rest) == 2 and {int(axis) % 2 for axis in rest} == {0, 1}  # type: ignore[arg-type]
    order = rest[0] if len(rest) == 1 else rest
    return name == "permute" and tuple(order) in ((1, 0), (-1, -2))  # type: ignore[arg-type]
