"""Small pictures as SVG: a few boxes in layers, and bars. No script, no style from outside.

Lines and text have the colour of the text around them, so they are seen on light and on dark.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from graphlib import TopologicalSorter
from itertools import pairwise

_FILL = {"call": "#2f6fdb", "constant": "#808080", "adapter": "#e0760c", "outside": "none"}
_LETTER, _HIGH, _GAP, _STEP = 7.2, 28, 16, 58  # pixels: a letter, a box, between boxes, a row
_THIN = 10  # where a line passes a row
Boxes = Sequence[tuple[str, str, Sequence[int]]]


def drawn(title: str, boxes: Boxes) -> str:
    """A graph from top to bottom.

    Args:
        title: said to who cannot see it.
        boxes: text, kind and the places of the boxes that each reads.
    """
    if not boxes:
        return ""
    rows, chains = _rows(boxes)
    widths = {n: len(box[0]) * _LETTER + 18 for n, box in enumerate(boxes)}
    every = [sum(widths.get(n, _THIN) + _GAP for n in row) for row in rows]
    wide = max(every)
    middle: dict[int, float] = {}
    parts = []
    for row, own in zip(rows, every, strict=True):
        left = (wide - own + _GAP) / 2
        for n in row:
            width = widths.get(n, _THIN)
            middle[n] = left + width / 2
            left += width + _GAP
    tops = {n: place * _STEP + 2 for place, row in enumerate(rows) for n in row}
    for chain in chains:
        points = [(middle[n], tops[n], n < len(boxes)) for n in chain]
        parts.append(_line(points))
    for n, (text, kind, _) in enumerate(boxes):
        parts.append(_box(text, kind, middle[n] - widths[n] / 2, tops[n], widths[n]))
    high = (len(rows) - 1) * _STEP + _HIGH + 4
    said = html.escape(f"{title}: {', '.join(text for text, _, _ in boxes)}")
    return (
        f'<svg role="img" aria-label="{said}" viewBox="0 0 {wide:.0f} {high}" width="{wide:.0f}" '
        f'style="max-width:100%;height:auto;font:12px ui-monospace,monospace">{"".join(parts)}'
        "</svg>"
    )


def bars(values: Sequence[float], said: str) -> str:
    """Values from left to right as bars, the largest as high as the picture.

    Args:
        values: not negative.
        said: what they are, to who cannot see them.
    """
    most, wide, high = max(values, default=0.0), 96, 24
    if most <= 0:
        return ""
    step = min(wide / len(values), 12.0)
    shown = [
        f'<rect x="{n * step:.1f}" y="{high - high * v / most:.1f}" width="{step * 0.8:.1f}" '
        f'height="{high * v / most:.1f}"/>'
        for n, v in enumerate(values)
    ]
    return (
        f'<svg role="img" aria-label="{html.escape(said)}" viewBox="0 0 {wide} {high}" '
        f'width="{wide}" height="{high}" fill="#2f6fdb"><title>{html.escape(said)}</title>'
        f'{"".join(shown)}<path d="M0 {high}H{wide}" stroke="currentColor" opacity=".4"/></svg>'
    )


def _rows(boxes: Boxes) -> tuple[list[list[int]], list[list[int]]]:
    """Boxes by row, with a place where a line passes one; and the lines, from row to row.

    Each box stands below all that it reads; what reads nothing, just above its first reader.
    """
    order = TopologicalSorter({n: box[2] for n, box in enumerate(boxes)}).static_order()
    depth: dict[int, int] = {}
    for n in order:
        depth[n] = 1 + max((depth[r] for r in boxes[n][2]), default=-1)
    for n, box in enumerate(boxes):
        users = [depth[m] for m, other in enumerate(boxes) if n in other[2]]
        depth[n] = min(users) - 1 if users and not box[2] else depth[n]
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
    return [_near(row, rows[place - 1], chains) for place, row in enumerate(rows)], chains


def _near(row: list[int], above: list[int], chains: Sequence[Sequence[int]]) -> list[int]:
    """A row in the order of what stands above it."""
    over: dict[int, list[int]] = {n: [] for n in row}
    for chain in chains:
        for one, other in pairwise(chain):
            if other in over and one in above:
                over[other].append(above.index(one))
    return sorted(row, key=lambda n: sum(over[n]) / len(over[n]) if over[n] else len(above))


def _line(points: Sequence[tuple[float, float, bool]]) -> str:
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
    return f'<path d="{path}{head}" fill="none" stroke="currentColor" opacity=".6"/>'


def _box(text: str, kind: str, left: float, top: float, width: float) -> str:
    dash = ' stroke-dasharray="4 3"' if kind == "outside" else ""
    return (
        f'<rect x="{left:.0f}" y="{top:.0f}" width="{width:.0f}" height="{_HIGH}" rx="5" '
        f'fill="{_FILL[kind]}" fill-opacity=".22" stroke="currentColor" stroke-opacity=".5"{dash}/>'
        f'<text x="{left + width / 2:.0f}" y="{top + _HIGH / 2 + 4:.0f}" text-anchor="middle" '
        f'fill="currentColor">{html.escape(text)}</text>'
    )
