from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lora_fx.export.spelling.sums import SumResiduals

GRAPH = """
g (float[b, n, 5] x, float[b, n, 4] h) => (float[b, n, 5] y{more})
<float[4, 5] w = {{{w}}}, float[5] bias = {{1.0, -2.0, 0.5, 0.0, 3.0}},
 float[5] one = {{1.0, 1.0, 1.0, 1.0, 1.0}}, {type}[b, n, 5] s>
{{
    p = MatMul(h, w)
    q = {inner}
    s = {sum}
    y = {norm}
}}
"""
NORM = "LayerNormalization <axis = -1> (s, one)"


def graph(
    inner: str = "Add(p, bias)", sum: str = "Add(q, x)", norm: str = NORM, more: str = ""
) -> str:
    w = ", ".join(str(float(n % 7 - 3)) for n in range(20))
    return GRAPH.format(inner=inner, sum=sum, norm=norm, more=more, w=w, type="float")


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({}, "s = Sum(q, x)"),
        ({"sum": "Add(x, q)"}, "s = Sum(x, q)"),
        ({"inner": "Relu(p)"}, "s = Sum(q, x)"),
        ({"norm": "RMSNormalization <axis = -1> (s, one)"}, "s = Sum(q, x)"),
        ({"more": ", float[b, n, 5] s"}, "s = Sum(q, x)"),
    ],
)
def test_a_sum_that_is_normalised(
    changed: dict[str, str], wanted: str, spelled: Callable[..., Any]
) -> None:
    found = spelled(SumResiduals, graph(**changed), b=2, n=3)
    assert found.count == 1
    assert wanted in found.text
    assert found.off < 1e-6


@pytest.mark.parametrize(
    "changed",
    [
        {"norm": "Relu(s)"},
        {"sum": "Mul(q, x)"},
        {"sum": "Add(p, bias)"},
        {"sum": "Sub(q, x)"},
    ],
)
def test_what_onnxruntime_does_not_fuse_stays(
    changed: dict[str, str], spelled: Callable[..., Any]
) -> None:
    found = spelled(SumResiduals, graph(**changed), b=2, n=3)
    assert found.count == 0
    assert not any("Sum" in row for row in found.text)
