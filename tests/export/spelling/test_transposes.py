from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lora_fx.export.spelling.transposes import TransposeOnce

# As torch.onnx exchanges the last two axes of what it does not know the number of axes of.
GRAPH = """
g (float[b, n, 3, 4] x) => (float[i, j, k, l] y)
<int64[1] minus = {{-1}}, int64[1] two = {{-2}}, int64[1] least = {{-9223372036854775808}},
 int64[1] most = {{9223372036854775807}}, int64[3] fixed = {{-1, 3, 4}}, float[b, 3, n, 4] k{more}>
{{
    k = Transpose <perm = [0, 2, 1, 3]> (x)
    sizes = Shape(k)
    last = Slice(sizes, minus, most)
    before = Slice(sizes, two, minus)
    first = Slice(sizes, least, two)
    inner = Concat <axis = 0> ({inner})
    flat = Reshape(k, inner)
    turned = Transpose <perm = [{perm}]> (flat)
    outer = Concat <axis = 0> ({outer})
    y = Reshape(turned, outer)
}}
"""
INNER, PERM, OUTER = "minus, before, last", "0, 2, 1", "first, last, before"


def graph(inner: str = INNER, perm: str = PERM, outer: str = OUTER, more: str = "") -> str:
    return GRAPH.format(inner=inner, perm=perm, outer=outer, more=more)


def test_two_axes_are_exchanged_in_one_step(spelled: Callable[..., Any]) -> None:
    found = spelled(TransposeOnce, graph(), b=2, n=5)
    assert found.count == 1
    assert found.text == ["y = Transpose(x)"]
    assert found.off == 0


def test_a_transpose_that_others_read_stays(spelled: Callable[..., Any]) -> None:
    text = graph().replace("(float[i, j, k, l] y)", "(float[i, j, k, l] y, float[b, 3, n, 4] z)")
    found = spelled(TransposeOnce, text.replace("y =", "z = Relu(k)\n y ="), b=2, n=5)
    assert found.text == ["k = Transpose(x)", "z = Relu(k)", "y = Transpose(x)"]
    assert found.off == 0


@pytest.mark.parametrize(
    "changed",
    [
        {"perm": "0, 1, 2", "outer": "first, before, last"},
        {"perm": "1, 0, 2"},
        {"outer": "first, before, last"},
        {"inner": "minus, last, before"},
        {"outer": "last, first, before"},
    ],
)
def test_what_gives_other_numbers_stays(
    changed: dict[str, str], spelled: Callable[..., Any]
) -> None:
    found = spelled(TransposeOnce, graph(**changed), b=2, n=5)
    assert found.count == 0
    assert any("Reshape" in row for row in found.text)
