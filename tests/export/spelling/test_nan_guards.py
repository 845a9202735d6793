from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from lora_fx.export.onnx_model.eager_numbers import MASKED
from lora_fx.export.spelling.nan_guards import guard_empty_rows
from tests.export.spelling.conftest import HEAD, shown

LEAST = "-3.4028234663852886e38"
GRAPH = """
g ({type}[2, 3, 5] q, {type}[2, 5, 4] k, {type}[2, 4, 5] v, {given}) => ({type}[2, 3, 5] y)
<{type} zero = {{0.0}}, {type} one = {{1.0}}, float least = {{LEAST}},
 float minus = {{-inf}}{stored}>
{{
    qk = MatMul(q, k)
    {mask}
    p = Softmax <axis = -1> (s)
    y = MatMul(p, v)
}}
""".replace("LEAST", LEAST)

ROWS = "bool[2, 3, 4] m"
# What is given, and the sum s of the products with it.
NEVER_EMPTY = {
    "no mask": (ROWS, "s = MatMul(q, k)"),
    "the least number": (ROWS, "a = Where(m, zero, least)\n s = Add(qk, a)"),
    "in front": (ROWS, "a = Where(m, zero, least)\n s = Add(a, qk)"),
    "spread out": (
        "bool[2, 1, 4] m",
        "n = Expand(m, sizes)\n a = Where(n, zero, least)\n b = Transpose <perm = [0, 1, 2]> (a)\n"
        "s = Add(qk, b)",
    ),
    "inverted": (
        ROWS,
        "c = Cast <to = 1> (m)\n d = Sub(one, c)\n a = Mul(d, least)\n s = Add(qk, a)",
    ),
    "far away besides": (
        "bool[2, 3, 4] m, int64[2, 3, 4] far",
        "a = Where(m, zero, one)\n b = Cast <to = 1> (far)\n c = Add(qk, b)\n s = Add(c, a)",
    ),
}
MAY_BE_EMPTY = {
    "a mask of the caller's": ("float[2, 3, 4] m", "s = Add(qk, m)"),
    "minus infinity": (ROWS, "a = Where(m, zero, minus)\n s = Add(qk, a)"),
    "in place of the products": (ROWS, "s = Where(m, qk, minus)"),
    "two masks": (
        f"{ROWS}, bool[2, 3, 4] n",
        "a = Where(m, zero, least)\n b = Where(n, zero, least)\n c = Add(qk, a)\n s = Add(c, b)",
    ),
    "whole numbers inverted": (
        "int64[2, 3, 4] m",
        "c = Cast <to = 1> (m)\n d = Sub(one, c)\n a = Mul(d, least)\n s = Add(qk, a)",
    ),
    "twice the least number": (ROWS, "a = Where(m, zero, least)\n b = Add(a, a)\n s = Add(qk, b)"),
    "stored": (ROWS, "s = Add(qk, kept)"),
    "stored, and may be overridden": ("bool[2, 3, 4] m, float[1] open", "s = Add(qk, open)"),
}


def graph(given: str, mask: str, type: str = "float") -> str:
    stored = ", int64[3] sizes = {2, 3, 4}, float[4] kept = {0.0, -inf, 0.0, 0.0}"
    return GRAPH.format(given=given, mask=mask, type=type, stored=stored)


def guarded(text: str) -> list[str]:
    """A graph whose last product is marked, as it is guarded."""
    model = ir.from_proto(onnx.parser.parse_model(HEAD + text))
    model.graph[-1].metadata_props[MASKED] = "a tensor"
    guard_empty_rows(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return shown(model)


@pytest.mark.parametrize("name", NEVER_EMPTY)
def test_there_is_no_guard_where_no_row_can_be_empty(name: str) -> None:
    assert guarded(graph(*NEVER_EMPTY[name]))[-2:] == ["p = Softmax(s)", "y = MatMul(p, v)"]


@pytest.mark.parametrize("name", MAY_BE_EMPTY)
def test_there_is_a_guard_where_a_row_may_be_empty(name: str) -> None:
    last = guarded(graph(*MAY_BE_EMPTY[name]))[-1]
    assert last.startswith("y = Where(")


def test_half_precision_has_no_room_for_a_score_below_the_least() -> None:
    text = graph(ROWS, "a = Where(m, zero, low)\n s = Add(qk, a)", "float16")
    text = text.replace("zero = {0.0}", "zero = {0}")
    text = text.replace("one = {1.0}", f"low = {{{0xFBFF}}}")  # -65504, by its bits
    assert guarded(text)[-1].startswith("y = Where(")
