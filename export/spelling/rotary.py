"""Fuses rotary positions into RotaryEmbedding of opset 23."""

from __future__ import annotations

from itertools import product

import onnx_ir as ir

from lora_fx.export.spelling.heads import HEADS_FIRST, before_heads
from lora_fx.export.spelling.rewrite import Spelling, number, producer, put
from lora_fx.export.spelling.sizes import shape_of

_STEPS = ("Cos", "Sin", "Mul", "Cast", "Identity", "Unsqueeze")


class FuseRotary(Spelling):
    """Says the rotation of two halves as RotaryEmbedding.

    Before -> after: ``x * cos + Concat(Neg(x[..., h:]), x[..., :h]) * sin`` ->
    ``RotaryEmbedding(x, cos, sin)``, of (batch, heads, length, size), where both halves of cos and
    sin are computed from the same angles.
    """

    since = 23
    what = "rotary positions by one operator, RotaryEmbedding of opset 23"

    def __init__(self) -> None:
        super().__init__()
        self._halves: dict[ir.Value, ir.Value] = {}

    def respell(self, node: ir.Node) -> bool:
        """Of the sum."""
        if producer(node.outputs[0], "Add") is None:
            return False
        for plain, turned in (node.inputs, node.inputs[::-1]):
            found = _rotated(plain, turned)
            if found is not None:
                x, *angles = found
                cos, sin = map(self._half, angles)
                nodes = _rotating(x, cos, sin)
                put(node, nodes, nodes[-1].outputs[0])
                return True
        return False

    def _half(self, value: ir.Value) -> ir.Value:
        if value not in self._halves:
            self._halves[value] = _of_one_half(value)
        return self._halves[value]


def _of_one_half(value: ir.Value) -> ir.Value:
    """Cosines or sines of the angles before these are joined with themselves."""
    step = producer(value, (*_STEPS, "Concat"))
    assert step is not None
    above = step.inputs[0]
    assert above is not None
    if step.op_type == "Concat":
        return above
    half = _of_one_half(above)
    if step.op_type == "Mul" and number(step.inputs[1]) == 1:
        return half
    new = ir.node(step.op_type, [half, *step.inputs[1:]], dict(step.attributes))
    new.metadata_props.update(step.metadata_props)
    new.outputs[0].type = step.outputs[0].type
    assert isinstance(step.graph, ir.Graph)
    step.graph.insert_after(step, [new])
    return new.outputs[0]


def _rotating(x: ir.Value, cos: ir.Value, sin: ir.Value) -> list[ir.Node]:
    """The calls that rotate, in front of what takes heads apart: then that may go too."""
    rows, turned = before_heads(x), producer(x, "Transpose")
    apart = producer(turned.inputs[0], "Reshape") if turned is not None else None
    if rows is None or apart is None:
        return [ir.node("RotaryEmbedding", [x, cos, sin])]
    whole = ir.node("RotaryEmbedding", [rows.value, cos, sin], {"num_heads": rows.heads})
    again = ir.node("Reshape", [whole.outputs[0], apart.inputs[1]], dict(apart.attributes))
    last = ir.node("Transpose", [again.outputs[0]], {"perm": HEADS_FIRST})
    for new, old in ((whole, rows.value), (again, apart.outputs[0])):
        new.outputs[0].type, new.outputs[0].shape = old.type, old.shape
    return [whole, again, last]


def _rotated(
    plain: ir.Value | None, turned: ir.Value | None
) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """What is rotated, and cosines and sines of (batch, length, size)."""
    one, other = producer(plain, "Mul"), producer(turned, "Mul")
    if one is None or other is None:
        return None
    orders = product(*((node.inputs, node.inputs[::-1]) for node in (one, other)))
    for (x, cos), (halves, sin) in orders:
        if x is None or not _is_turned(halves, x):
            continue
        cosines, sines = _angles(cos, "Cos", x), _angles(sin, "Sin", x)
        if cosines is not None and sines is not None:
            return x, cosines, sines
    return None


def _is_turned(value: ir.Value | None, x: ir.Value) -> bool:
    """Whether a value is the second half of x, negated, and the first."""
    joined, shape = producer(value, "Concat"), shape_of(x)
    if joined is None or shape is None or len(shape) != 4 or not isinstance(shape[3], int):
        return False
    if len(joined.inputs) != 2 or joined.attributes["axis"].as_int() not in (-1, 3):
        return False
    minus = producer(joined.inputs[0], "Neg")
    parts = [producer(v, "Slice") for v in (minus.inputs[0] if minus else None, joined.inputs[1])]
    half = shape[3] // 2
    wanted = [(half, shape[3]), (0, half)]
    return shape[3] % 2 == 0 and all(
        part is not None and part.inputs[0] is x and _bounds(part, shape[3]) == bounds
        for part, bounds in zip(parts, wanted, strict=True)
    )


def _bounds(part: ir.Node, size: int) -> tuple[float, float] | None:
    numbers = [number(given) for given in part.inputs[1:]]
    if (
        len(numbers) < 3
        or None in numbers
        or numbers[2] not in (-1, 3)
        or numbers[3:] not in ([], [1.0])
    ):
        return None
    start, end = numbers[:2]
    assert start is not None
    assert end is not None
    return start, min(end, size)


def _angles(value: ir.Value | None, kind: str, x: ir.Value) -> ir.Value | None:
    """Cosines or sines of (batch, length, size), both halves of which are the same."""
    heads, whole = producer(value, "Unsqueeze"), shape_of(x)
    inner = heads.inputs[0] if heads is not None else None
    sizes = shape_of(inner)
    if heads is None or number(heads.inputs[1]) != 1 or sizes is None or whole is None:
        return None
    if sizes != (whole[0], *whole[2:]):
        return None
    step, kinds = producer(inner, _STEPS), set()
    while step is not None:
        kinds.add(step.op_type)
        if step.op_type == "Mul" and number(step.inputs[1]) is None:
            return None
        above = step.inputs[0]
        step = producer(above, _STEPS)
        last = above
    joined = producer(last, "Concat") if kinds else None
    is_same = (
        joined is not None and len(joined.inputs) == 2 and joined.inputs[0] is joined.inputs[1]
    )
    is_last = is_same and joined is not None and joined.attributes["axis"].as_int() in (-1, 2)
    return inner if is_last and kind in kinds else None
