from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lora_fx.export.spelling.idle_calls import DropIdleCalls

GRAPH = """
g (float[b, n, 5] x, bool[b, n] m) => ({result} y)
<int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] less = {{-1}},
 int64[1] end = {{9223372036854775807}}, int64[1] start = {{-9223372036854775807}},
 int64[2] both = {{0, 3}}, int64[3] sizes = {{1, 1, 5}}, bool[1] yes = {{1}}, bool[1] no = {{0}},
 {types}>
{{
    {calls}
}}
"""
WHOLE, TRUE = "float[b, n, 5]", "bool[b, n]"


def graph(calls: str, types: str, result: str) -> str:
    return GRAPH.format(calls=calls, types=types, result=result)


@pytest.mark.parametrize(
    ("calls", "types", "result"),
    [
        ("h = Slice(x, zero, end, one)  y = Neg(h)", f"{WHOLE} h", WHOLE),
        ("h = Slice(x, zero, end, one, one)  y = Neg(h)", f"{WHOLE} h", WHOLE),
        ("h = Expand(x, sizes)  y = Neg(h)", f"{WHOLE} h", WHOLE),
        ("h = Transpose <perm = [0, 1, 2]> (x)  y = Neg(h)", f"{WHOLE} h", WHOLE),
        ("h = And(m, yes)  y = Not(h)", f"{TRUE} h", TRUE),
        ("h = And(yes, m)  y = Not(h)", f"{TRUE} h", TRUE),
        ("h = Cast <to = 1> (x)  y = Neg(h)", f"{WHOLE} h", WHOLE),
    ],
)
def test_what_changes_nothing_goes(
    calls: str, types: str, result: str, spelled: Callable[..., Any]
) -> None:
    found = spelled(DropIdleCalls, graph(calls, types, result), b=2, n=3)
    assert found.count == 1
    assert len(found.text) == 1
    assert found.text[0][-2] in "xm"
    assert found.off == 0


@pytest.mark.parametrize(
    ("calls", "types", "result"),
    [
        ("h = Slice(x, start, end, one)  y = Neg(h)", "float[b, k, 5] h", "float[b, k, 5]"),
        ("h = Slice(x, less, start, two, less)  y = Neg(h)", f"{WHOLE} h", WHOLE),
        ("h = Transpose <perm = [0, 2, 1]> (x)  y = Neg(h)", "float[b, 5, n] h", "float[b, 5, n]"),
        ("h = And(m, no)  y = Not(h)", f"{TRUE} h", TRUE),
        ("k = Tile(m, both)  h = And(k, yes)  y = Not(h)", f"{TRUE} h2", "bool[none, more]"),
        ("h = Or(m, yes)  y = Not(h)", f"{TRUE} h", TRUE),
        ("y = Expand(x, sizes)", f"{WHOLE} h", WHOLE),
        ("h = Cast <to = 1> (m)  y = Neg(h)", "float[b, n] h", "float[b, n]"),
        ("h = Cast <to = 11> (x)  y = Neg(h)", f"{WHOLE} unnoted", "double[b, n, 5]"),
    ],
)
def test_what_may_change_something_stays(
    calls: str, types: str, result: str, spelled: Callable[..., Any]
) -> None:
    found = spelled(DropIdleCalls, graph(calls, types, result), b=2, n=3)
    assert found.count == 0
    assert found.off == 0


def test_a_softmax_is_of_the_type_of_what_it_reads(spelled: Callable[..., Any]) -> None:
    calls = "p = Softmax(x)  h = Cast <to = {to}> (p)  y = Neg(h)"
    same = spelled(DropIdleCalls, graph(calls.format(to=1), f"{WHOLE} h", WHOLE), b=2, n=3)
    assert (same.count, same.off) == (1, 0)
    double = "double[b, n, 5]"
    other = spelled(DropIdleCalls, graph(calls.format(to=11), f"{double} h", double), b=2, n=3)
    assert (other.count, other.off) == (0, 0)


@pytest.mark.parametrize(
    ("first", "then", "middle", "last"),
    [
        ("one", "one", "b, 1, n, 5", "b, 1, 1, n, 5"),
        ("one", "both", "b, 1, n, 5", "1, b, 1, 1, n, 5"),
        ("less", "zero", "b, n, 5, 1", "1, b, n, 5, 1"),
        ("two", "less", "b, n, 1, 5", "b, n, 1, 5, 1"),
        ("both", "two", "1, b, n, 1, 5", "1, b, 1, n, 1, 5"),
    ],
)
def test_axes_are_added_at_once(
    first: str, then: str, middle: str, last: str, spelled: Callable[..., Any]
) -> None:
    calls = f"h = Unsqueeze(x, {first})  y = Unsqueeze(h, {then})"
    found = spelled(DropIdleCalls, graph(calls, f"float[{middle}] h", f"float[{last}]"), b=2, n=3)
    assert found.count == 1
    assert found.text[-1].startswith("y = Unsqueeze(x, ")
    assert found.off == 0
