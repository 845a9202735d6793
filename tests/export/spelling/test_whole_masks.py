from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lora_fx.export.spelling.whole_masks import ReadWholeMasks

GRAPH = """
g (float[b, n] m) => (float[{whole}] y)
<int64 start = {{{start}}}, int64 step = {{{step}}}, int64 nothing = {{{offset}}},
 int64[1] last = {{-1}}, int64[3] behind = {{{behind}}}, int64[3] before = {{{before}}},
 int64 zero = {{0}}, int64 one = {{1}}, int64[{count}] r, int64[{columns}] c,
 float[{whole}] read>
{{
    rows = Shape <start = 0, end = 1> (m)
    row = Squeeze(rows)
    r = Range(zero, row, one)
    sizes = Shape <start = 1, end = 2> (m)
    size = Squeeze(sizes)
    steps = Mul({limit}, step)
    end = Add(steps, start)
    c = Range(start, end, step)
    moved = Add(c, nothing)
    r4 = Unsqueeze(r, behind)
    c4 = Unsqueeze(moved, before)
    every = Range(zero, size, one)
    every4 = Unsqueeze(every, before)
    both = Add(r4, every4)
    shape = Shape(both)
    re = Expand(r4, shape)
    ce = Expand(c4, shape)
    r5 = Unsqueeze(re, last)
    c5 = Unsqueeze(ce, last)
    places = Concat <axis = -1> ({places})
    read = GatherND <batch_dims = 0> (m, places)
    y = Neg(read)
}}
"""
PLAIN: dict[str, Any] = {
    "whole": "b, 1, 1, n", "start": 0, "step": 1, "offset": 0, "behind": "1, 2, 3",
    "before": "0, 1, 2", "count": "b", "columns": "n", "places": "r5, c5", "limit": "size",
}  # fmt: skip


def graph(**changed: Any) -> str:
    return GRAPH.format(**PLAIN | changed)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"whole": "1, b, n, 1", "behind": "0, 2, 3", "before": "0, 1, 3"},
        {"whole": "b, n, 1, 1", "behind": "1, 2, 3", "before": "0, 2, 3"},
    ],
)
def test_a_mask_is_read_whole(changed: dict[str, Any], spelled: Callable[..., Any]) -> None:
    found = spelled(ReadWholeMasks, graph(**changed), b=2, n=3)
    assert found.count == 1
    assert "GatherND" not in str(found.text)
    assert found.off == 0


@pytest.mark.parametrize(
    ("changed", "n"),
    [
        ({"start": -1}, 3),
        ({"offset": -1}, 3),
        ({"step": 2}, 1),
        ({"places": "r5, r5"}, 2),
        ({"places": "c5, r5", "whole": "b, 1, 1, n"}, 2),
        ({"whole": "n, 1, 1, b", "behind": "0, 1, 2", "before": "1, 2, 3"}, 3),
        ({"columns": "k", "whole": "b, 1, 1, k"}, 3),
        ({"limit": "one", "columns": "1"}, 3),
    ],
)
def test_what_reads_other_places_stays(
    changed: dict[str, Any], n: int, spelled: Callable[..., Any]
) -> None:
    found = spelled(ReadWholeMasks, graph(**changed), b=2, n=n)
    assert found.count == 0
    assert found.off == 0
