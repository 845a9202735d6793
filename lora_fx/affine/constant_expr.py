"""Constants that are computed from smaller ones, as expressions of those.

``x @ (a @ b).T`` multiplies with a matrix of full size; the factors say that its rank is low.
"""

from __future__ import annotations

from math import prod
from typing import Any

from torch import fx

from lora_fx.algebra.matrix_expr import Leaf, Matrix, Sum, product, scaled, signed, transposed
from lora_fx.graph.constants import Constants
from lora_fx.graph.ops import call_argument, op_name

_TURNS = {"t", "T", "numpy_T", "mT", "adjoint"}
_PASSES = {"to", "float", "double", "clone", "contiguous", "detach", "alias", "_to_copy"}
_VIEWS = {"view", "reshape", "view_as", "reshape_as", "expand", "expand_as"}


def factored(constants: Constants, node: fx.Node) -> Matrix | None:
    """A constant of two axes as an expression, or None if it has not two."""
    return in_rows(constants, node) if _has_two_axes(constants, node) else None


def in_rows(constants: Constants, node: fx.Node) -> Matrix | None:
    """A constant as an expression of a matrix: its first axis, and all others as the second.

    Returns:
        None if it has less than two axes.
    """
    shape = constants.shape(node)
    if shape is None or len(shape) < 2:
        return None
    flat = shape[0], prod(shape[1:])
    found = None if constants.is_long(node) else _expression(constants, node)
    return found if found and found.shape == flat else leaf(constants, node, flat)


def leaf(constants: Constants, node: fx.Node, shape: tuple[int, int]) -> Leaf:
    """A constant, reshaped to a matrix."""
    return Leaf(shape, constants.key(node), lambda: constants.value(node))


def _expression(constants: Constants, node: fx.Node) -> Matrix | None:
    name, first, second = op_name(node), *_operands(node)
    if name == "mul" and _is_factor(constants, first):
        first, second = second, first
    one = _matrix(constants, first)
    if one is None or node.op == "get_attr":
        return None
    if name in _PASSES | _VIEWS:
        return one if constants.dtype(node).is_floating_point else None
    if name in ("mul", "div", "truediv") and isinstance(second, int | float) and second != 0:
        return signed(one, float(second) if name == "mul" else 1 / second)
    if name == "mul" and _is_factor(constants, second):
        return scaled(leaf(constants, second, (1, 1)), one)
    if name in ("add", "sub"):
        other = _matrix(constants, second)
        other = other and signed(other, 1 if name == "add" else -1)
        return other and _sum(one, other, call_argument(node, 2, "alpha", 1))
    return _of_two_axes(constants, node, one) if _has_two_axes(constants, first) else None


def _of_two_axes(constants: Constants, node: fx.Node, one: Matrix) -> Matrix | None:
    """What a call makes of a matrix that no tensor of more axes could stand for."""
    name, second = op_name(node), _operands(node)[1]
    if turns(node):
        return transposed(one)
    other = _matrix(constants, second) if _has_two_axes(constants, second) else None
    if other is None:
        return None
    if name in ("matmul", "mm"):
        return product(one, other)
    third = _matrix(constants, node.args[2]) if name == "addmm" else None
    beta, alpha = call_argument(node, 3, "beta", 1), call_argument(node, 4, "alpha", 1)
    return third and _sum(one, product(other, third), alpha, beta)


def _sum(one: Matrix, other: Matrix, alpha: Any, beta: Any = 1) -> Matrix | None:
    """``beta one + alpha other``, if these are numbers and nothing is repeated."""
    are_numbers = isinstance(alpha, int | float) and isinstance(beta, int | float)
    is_whole = are_numbers and one.shape == other.shape
    return Sum(signed(one, beta), signed(other, alpha)) if is_whole else None


def _operands(node: fx.Node) -> tuple[Any, Any]:
    return call_argument(node, 0, "input"), call_argument(node, 1, "other")


def _is_constant(constants: Constants, value: Any) -> bool:
    is_known = isinstance(value, fx.Node) and value in constants.nodes
    return is_known and constants.is_floating(value)


def _has_two_axes(constants: Constants, value: Any) -> bool:
    return _is_constant(constants, value) and len(constants.shape(value) or ()) == 2


def _is_factor(constants: Constants, value: Any) -> bool:
    """Whether a value is one number for all: by itself, or as a tensor."""
    if not _is_constant(constants, value):
        return isinstance(value, int | float)
    return set(constants.shape(value) or ()) <= {1}


def _matrix(constants: Constants, value: Any) -> Matrix | None:
    return in_rows(constants, value) if _is_constant(constants, value) else None


def turns(node: fx.Node) -> bool:
    """Whether a call swaps the axes of a matrix."""
    name = op_name(node)
    rest: Any = node.args[1:]
    if name == "getattr":
        return rest[0] in _TURNS
    if name in ("transpose", "swapaxes", "swapdims") and len(rest) == 2:
        return {int(axis) % 2 for axis in rest} == {0, 1}
    order = rest[0] if len(rest) == 1 else rest
    if name == "permute":
        return tuple(order) in ((1, 0), (-1, -2))
    return name in _TURNS
