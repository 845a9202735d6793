"""Shape inference by value: the sizes that a graph computes, as numbers and names of axes."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from lora_fx.export.spelling.rewrite import producer

_ELEMENTWISE = ("Where", "Add", "Mul", "Sub", "Div", "Cast", "Identity", "And", "Sum")
Sizes = tuple[int | str, ...]  # an axis by its name, which stands for one size in a whole model


def shape_of(value: ir.Value | None) -> Sizes | None:
    """The sizes of a value, if all are numbers or names; of elementwise ones, as they follow."""
    if value is None:
        return None
    if value.shape is None:
        return _followed(value)
    found = tuple(_named(size) for size in value.shape)
    return None if None in found else found  # type: ignore[return-value]


def _named(size: int | ir.SymbolicDim) -> int | str | None:
    """An axis by its name; torch writes the terms of a sum in any order."""
    name = size if isinstance(size, int) else size.value
    return " + ".join(sorted(name.split(" + "))) if isinstance(name, str) else name


def _followed(value: ir.Value) -> Sizes | None:
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None:
        return tuple(tensor.shape.numpy())
    node = producer(value, (*_ELEMENTWISE, "Transpose"))
    shapes = [shape_of(given) for given in node.inputs] if node is not None else [None]
    if node is None or None in shapes:
        return None
    if node.op_type == "Transpose":
        (shape,) = shapes
        return tuple(shape[axis] for axis in node.attributes["perm"].as_ints())  # type: ignore[index]
    return _broadcast([shape for shape in shapes if shape is not None])


def _broadcast(shapes: list[Sizes]) -> Sizes | None:
    rank = max(map(len, shapes))
    columns = zip(*((1,) * (rank - len(shape)) + shape for shape in shapes), strict=True)
    found = [{size for size in column if size != 1} or {1} for column in columns]
    return None if any(len(sizes) > 1 for sizes in found) else tuple(s for (s,) in found)


def sizes_in(value: ir.Value | None) -> Sizes | None:
    """What a list of sizes holds, such as the one that a Reshape is given."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if value is None or value.is_graph_input():
        return None
    if tensor is not None:
        return tuple(map(int, tensor.numpy().reshape(-1)))
    node = producer(value, _READ)
    return None if node is None else _READ[node.op_type](node)


def _shape(node: ir.Node) -> Sizes | None:
    whole = shape_of(node.inputs[0])
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
    return None if whole is None else whole[start:end]


def _concat(node: ir.Node) -> Sizes | None:
    parts: Sizes = ()
    for value in node.inputs:
        part = sizes_in(value)
        if part is None:
            return None
        parts += part
    return parts


def _slice(node: ir.Node) -> Sizes | None:
    whole, *given = map(sizes_in, node.inputs)
    bounds = [bound[0] for bound in given if bound is not None and len(bound) == 1]
    if whole is None or len(bounds) != len(given) or bounds[3:] not in ([], [1]):
        return None
    start, end = bounds[:2]  # of the only axis that a list has
    return whole[start:end] if isinstance(start, int) and isinstance(end, int) else None


def _same(node: ir.Node) -> Sizes | None:
    return sizes_in(node.inputs[0])


def _reshape(node: ir.Node) -> Sizes | None:
    return sizes_in(node.inputs[0]) if sizes_in(node.inputs[1]) == (-1,) else None


_READ: dict[str, Callable[[ir.Node], Sizes | None]] = {
    "Shape": _shape,
    "Concat": _concat,
    "Slice": _slice,
    "Squeeze": _same,
    "Unsqueeze": _same,
    "Identity": _same,
    "Cast": _same,
    "Reshape": _reshape,
}
