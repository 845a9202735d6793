"""Constants that are computed from smaller ones, as expressions of those.

``x @ (a @ b).T`` multiplies with a matrix of full size; the factors say that its rank is low.
"""

from __future__ import annotations

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
    if op_name(node) == "mul" and _is_factor(constants, first):
        first, second = second, first
    one = _matrix(constants, first)
    if one is None or node.op == "get_attr":
        return None
    name = op_name(node)
    if name in _PASSES or (name in _VIEWS and constants.shape(node) == one.shape):
        return one if constants.dtype(node).is_floating_point else None
    if name in _TURNS or (name == "getattr" and second in _TURNS) or _swaps(name, node):
        return transposed(one)
    if name in ("mul", "div", "truediv") and isinstance(second, int | float) and second != 0:
        return signed(one, float(second) if name == "mul" else 1 / second)
    if name == "mul" and _is_factor(constants, second):
        return scaled(leaf(constants, second, (1, 1)), one)
    other = _matrix(constants, second)
    if other is None:
        return None
    if name in ("matmul", "mm"):
        return product(one, other)
    third = _matrix(constants, node.args[2]) if name == "addmm" else None
    if third is not None:
        other, name = product(other, third), "add"
    factors: Any = node.kwargs
    alpha, beta = factors.get("alpha", 1), factors.get("beta", 1)
    are_numbers = isinstance(alpha, int | float) and isinstance(beta, int | float)
    if name not in ("add", "sub") or one.shape != other.shape or not are_numbers:
        return None
    return Sum(signed(one, beta), signed(other, alpha if name == "add" else -alpha))


def _is_factor(constants: Constants, value: Any) -> bool:
    """Whether a value is one number for all: by itself, or as a tensor."""
    if not isinstance(value, fx.Node) or value not in constants.nodes:
        return isinstance(value, int | float)
    shape = constants.shape(value)
    return shape is not None and set(shape) <= {1} and constants.is_floating(value)


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
