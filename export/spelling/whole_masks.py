"""Reads a mask whole where a graph gathers it place by place, at every place that it has."""

from __future__ import annotations

import onnx_ir as ir

from lora_fx.export.spelling.rewrite import Spelling, number, producer, put, shaped
from lora_fx.export.spelling.sizes import shape_of, sizes_in


class ReadWholeMasks(Spelling):
    """Reads a tensor as it is where each of its places is named.

    Before -> after: ``GatherND(m, Concat(all rows, all columns))``, as ``m[rows, columns]`` is said
    in ONNX -> ``Unsqueeze(m)``.
    """

    what = "masks read whole, and not place by place"

    def respell(self, node: ir.Node) -> bool:
        """Of the call that reads."""
        result = node.outputs[0]
        if producer(result, "GatherND") is None or node.attributes.get_int("batch_dims", 0) != 0:
            return False
        sizes, whole = shape_of(node.inputs[0]), shape_of(result)
        if sizes is None or whole is None:
            return False
        axes = _axes(node.inputs[1], sizes, len(whole))
        if axes is None or axes != sorted(set(axes)):
            return False
        if whole != tuple(sizes[axes.index(a)] if a in axes else 1 for a in range(len(whole))):
            return False
        added = [axis for axis in range(len(whole)) if axis not in axes]
        nodes = shaped("Unsqueeze", node.inputs[0], added)
        put(node, nodes, nodes[-1].outputs[0])
        return True


def _axes(places: ir.Value | None, sizes: tuple[int | str, ...], rank: int) -> list[int] | None:
    """Along which axis of the result each axis of a tensor is read, from its first place on."""
    joined = producer(places, "Concat")
    if joined is None or len(joined.inputs) != len(sizes):
        return None
    if joined.attributes["axis"].as_int() not in (-1, rank):
        return None
    found = [
        counting(part, size, rank + 1) for part, size in zip(joined.inputs, sizes, strict=True)
    ]
    axes = [axis for axis in found if axis is not None]
    return axes if len(axes) == len(sizes) else None


def counting(
    value: ir.Value | None, size: int | str, rank: int, start: int | str = 0
) -> int | None:
    """The axis of a value along which it counts, from a start on; it is the same along others.

    Args:
        value: of so many axes.
        size: how many numbers it counts.
        rank: how many axes it has.
        start: the first of them: a number, or the size of an axis.
    """
    node = producer(value, ("Range", "Unsqueeze", "Expand", "Add"))
    if node is None:
        return None
    first, *others = node.inputs
    if node.op_type == "Range":
        counts = shape_of(value) == (size,) and _is(first, start) and number(others[1]) == 1
        return 0 if counts and rank == 1 else None
    if node.op_type == "Unsqueeze":
        added = {int(axis) % rank for axis in sizes_in(others[0]) or ()}
        axis = counting(first, size, rank - len(added), start)
        kept = [place for place in range(rank) if place not in added]
        return None if axis is None or not added else kept[axis]
    if node.op_type == "Expand":  # to no more axes, since it counts along one of as many before
        return counting(first, size, rank, start)
    (other,) = others
    moved = [(first, other), (other, first)]
    found = [counting(one, size, rank, start) for one, by in moved if number(by) == 0]
    found += [counting(one, size, rank) for one, by in moved if _is(by, start)]
    return next((axis for axis in found if axis is not None), None)


def _is(value: ir.Value | None, wanted: int | str) -> bool:
    """Whether a value is one number, or the size of an axis by its name."""
    return number(value) == wanted or sizes_in(value) == (wanted,)
