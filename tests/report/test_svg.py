"""Small pictures: nothing overlaps, nothing leaves the picture, and text stays text."""

from __future__ import annotations

import itertools
from xml.etree import ElementTree

import pytest

from lora_fx.report.svg import bars, drawn

BRANCH = [
    ("x", "outside", []),
    ("weight (5, 3)", "constant", []),
    ("linear", "call", [0, 1]),
    ("lora_A", "adapter", []),
    ("matmul", "call", [0, 3]),
    ("lora_B", "adapter", []),
    ("matmul", "call", [4, 5]),
    ("add", "call", [2, 6]),
    ("tanh", "outside", [7]),
]
CHAIN = [(f"call {n}", "call", [n - 1] if n else []) for n in range(12)]
WIDE = [*((f"tensor {n}", "constant", []) for n in range(9)), ("cat", "call", list(range(9)))]


def boxes_of(picture: str) -> list[tuple[float, ...]]:
    every = ElementTree.fromstring(picture).iter("rect")
    return [tuple(float(r.get(k, "")) for k in ("x", "y", "width", "height")) for r in every]


@pytest.mark.parametrize("graph", [BRANCH, CHAIN, WIDE, BRANCH[:1]])
def test_boxes_lie_apart_and_inside(graph: list[tuple[str, str, list[int]]]) -> None:
    picture = drawn("a layer", graph)
    wide, high = map(float, ElementTree.fromstring(picture).get("viewBox", "").split()[2:])
    found = boxes_of(picture)
    assert len(found) == len(graph)
    for x, y, w, h in found:
        assert x >= -1
        assert x + w <= wide + 1
        assert y >= 0
        assert y + h <= high
    for one, other in itertools.combinations(found, 2):
        across = one[0] < other[0] + other[2] and other[0] < one[0] + one[2]
        along = one[1] < other[1] + other[3] and other[1] < one[1] + one[3]
        assert not (across and along), (one, other)


def test_each_box_stands_below_what_it_reads() -> None:
    tops = [y for _, y, _, _ in boxes_of(drawn("", BRANCH))]
    assert all(tops[read] < tops[n] for n, box in enumerate(BRANCH) for read in box[2])
    assert tops[5] == tops[4], "a tensor just above its reader"


def test_there_is_a_line_for_each_read() -> None:
    lines = list(ElementTree.fromstring(drawn("", BRANCH)).iter("path"))
    assert len(lines) == sum(len(box[2]) for box in BRANCH)


def test_text_is_escaped_and_said() -> None:
    hostile = "</text><script>\"&'"
    picture = drawn(hostile, [(hostile, "call", [])])
    assert [t.text for t in ElementTree.fromstring(picture).iter("text")] == [hostile]
    assert hostile in ElementTree.fromstring(picture).get("aria-label", "")
    assert "<script" not in picture


def test_bars_are_as_high_as_the_values() -> None:
    heights = [h for *_, h in boxes_of(bars([4.0, 2.0, 1.0], "three"))]
    assert [round(h / heights[0], 2) for h in heights] == [1.0, 0.5, 0.25]
    many = boxes_of(bars([1.0] * 64, "many"))
    assert max(x + w for x, _, w, _ in many) <= 96
    assert bars([], "") == bars([0.0], "") == drawn("", []) == ""
