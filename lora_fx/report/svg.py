"""Small pictures as SVG: a few boxes in layers, and bars. No script, no style from outside.

Lines and text have the colour of the text around them, so they are seen on light and on dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from graphlib import TopologicalSorter
from itertools import pairwise

from lora_fx.tables import Html, element

KINDS = {
    "call": "#2f6fdb",
    "constant": "#808080",
    "adapter": "#e0760c",
    "outside": "none",
}  # of boxes: their colour
_LETTER, _HIGH, _GAP, _STEP = 7.2, 28, 16, 58  # pixels: a letter, a box, between boxes, a row
_THIN = 10  # where a line passes a row
Boxes = Sequence[tuple[str, str, Sequence[int]]]


def drawn(title: str, boxes: Boxes) -> Html:
    """A graph from top to bottom.

    Args:
        title: said to who cannot see it.
        boxes: text, kind and the places of the boxes that each reads.
    """
    if not boxes:
        return Html()
    rows, chains = _rows(boxes)
    widths = {n: len(box[0]) * _LETTER + 18 for n, box in enumerate(boxes)}
    every = [sum(widths.get(n, _THIN) + _GAP for n in row) for row in rows]
    wide = max(every)
    middle: dict[int, float] = {}
    for row, own in zip(rows, every, strict=True):
        left = (wide - own + _GAP) / 2
        for n in row:
            width = widths.get(n, _THIN)
            middle[n] = left + width / 2
            left += width + _GAP
    tops = {n: place * _STEP + 2 for place, row in enumerate(rows) for n in row}
    parts = [_line([(middle[n], tops[n], n < len(boxes)) for n in chain]) for chain in chains]
    for n, (text, kind, _) in enumerate(boxes):
        parts += _box(text, kind, middle[n], tops[n], widths[n])
    high = (len(rows) - 1) * _STEP + _HIGH + 4
    said = f"{title}: {', '.join(text for text, _, _ in boxes)}"
    style = "max-width:100%;height:auto;font:12px ui-monospace,monospace"
    return _svg(round(wide), high, said, *parts, style=style)


def bars(values: Sequence[float], said: str) -> Html:
    """Values from left to right as bars, the largest as high as the picture.

    Args:
        values: not negative; what is not finite is left out.
        said: what they are, to who cannot see them.
    """
    values = [value for value in values if math.isfinite(value)]
    most, wide, high = max(values, default=0.0), 96, 24
    if most <= 0:
        return Html()
    step = min(wide / len(values), 12.0)
    shown = [
        element(
            "rect", x=f"{n * step:.1f}", y=f"{high - high * v / most:.1f}",
            width=f"{step * 0.8:.1f}", height=f"{high * v / most:.1f}",
        )
        for n, v in enumerate(values)
    ]  # fmt: skip
    line = element("path", d=f"M0 {high}H{wide}", stroke="currentColor", opacity=0.4)
    return _svg(wide, high, said, element("title", said), *shown, line, fill="#2f6fdb")


def _svg(wide: int, high: int, said: str, *parts: Html, **more: str) -> Html:
    box = f"0 0 {wide} {high}"
    return element("svg", *parts, role="img", aria_label=said, viewBox=box, width=wide, **more)


def _rows(boxes: Boxes) -> tuple[list[list[int]], list[list[int]]]:
    """Boxes by row, with a place where a line passes one; and the lines, from row to row."""
    depth = _depths(boxes)
    rows: list[list[int]] = [[] for _ in range(max(depth.values()) + 1)]
    for n in range(len(boxes)):
        rows[depth[n]].append(n)
    chains, fresh = [], len(boxes)
    for n, box in enumerate(boxes):
        for read in box[2]:
            passed = range(fresh, fresh + depth[n] - depth[read] - 1)
            for row, place in enumerate(passed, depth[read] + 1):
                rows[row].append(place)
            chains.append([read, *passed, n])
            fresh += len(passed)
    ordered = rows[:1]
    for own in rows[1:]:
        ordered.append(_near(own, ordered[-1], chains))
    return ordered, chains


def _depths(boxes: Boxes) -> dict[int, int]:
    """The row of each box: below all that it reads; what reads nothing, just above its reader."""
    depth: dict[int, int] = {}
    for n in TopologicalSorter({n: box[2] for n, box in enumerate(boxes)}).static_order():
        depth[n] = 1 + max((depth[read] for read in boxes[n][2]), default=-1)
    for n, box in enumerate(boxes):
        readers = [depth[m] for m, other in enumerate(boxes) if n in other[2]]
        if readers and not box[2]:
            depth[n] = min(readers) - 1
    return depth


def _near(row: list[int], above: list[int], chains: Sequence[Sequence[int]]) -> list[int]:
    """A row in the order of what stands above it."""
    over: dict[int, list[int]] = {n: [] for n in row}
    for chain in chains:
        for one, other in pairwise(chain):
            if other in over and one in above:
                over[other].append(above.index(one))
    return sorted(row, key=lambda n: sum(over[n]) / len(over[n]) if over[n] else len(above))


def _line(points: Sequence[tuple[float, float, bool]]) -> Html:
    (x, y, _), *rest = points
    y += _HIGH
    path = f"M{x:.0f} {y:.0f}"
    for to, top, is_box in rest:
        path += f"C{x:.0f} {(y + top) / 2:.0f} {to:.0f} {(y + top) / 2:.0f} {to:.0f} {top:.0f}"
        x, y = to, top
        if not is_box:
            y += _HIGH
            path += f"V{y:.0f}"
    head = f"M{x - 3:.0f} {y - 6:.0f}L{x:.0f} {y:.0f}L{x + 3:.0f} {y - 6:.0f}"
    return element("path", d=path + head, fill="none", stroke="currentColor", opacity=0.6)


def _box(text: str, kind: str, middle: float, top: float, width: float) -> tuple[Html, Html]:
    dash = {"stroke_dasharray": "4 3"} if kind == "outside" else {}
    frame = element(
        "rect", x=round(middle - width / 2), y=top, width=round(width), height=_HIGH, rx=5,
        fill=KINDS[kind], fill_opacity=0.22, stroke="currentColor", stroke_opacity=0.5, **dash,
    )  # fmt: skip
    at = {"x": round(middle), "y": round(top + _HIGH / 2 + 4)}
    return frame, element("text", text, **at, text_anchor="middle", fill="currentColor")
