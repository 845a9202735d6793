"""Traced costs against counts made by hand, and the choice they make against what was measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lora_fx.branch_lowering import cost, forms
from lora_fx.branch_lowering.cost import Cost, LayerShape, cost_of, cost_of_shrink
from lora_fx.graph.ops import aten

SQUARE = LayerShape(n=256, d=768, o=768, r=16, size=4, biased=False)
SHAPES = [
    SQUARE,
    replace(SQUARE, biased=True, r=8),
    LayerShape(n=7, d=5, o=3, r=2, size=2),
    LayerShape(n=1, d=384, o=1536, r=33, size=8, biased=False),
]


def merged(shape: LayerShape) -> Cost:
    return cost_of(forms.merged, shape)


def factored(shape: LayerShape, ones: bool = False) -> Cost:
    return cost_of(forms.factored, shape, ones)


def augmented(shape: LayerShape, ones: bool = False) -> Cost:
    return cost_of(forms.augmented, shape, ones)


def shrink(shape: LayerShape) -> Cost:
    return cost_of_shrink(shape, (shape.r,))


def weight(shape: LayerShape) -> Cost:
    return cost_of(forms.made, shape, slots=True)


def test_costs_add_up() -> None:
    total = Cost(1.0, 2.0, 3) + Cost(10.0, 20.0, 30)
    assert total == Cost(11.0, 22.0, 33)
    assert total.work == 11 + cost.BYTE_FLOPS * 22 + cost.CALL_FLOPS * 33
    assert str(Cost(2e6, 5e5, 4)) == "2 MFLOP, 0.5 MB, 4 calls"


def test_the_formulas_are_those_of_the_definition() -> None:
    n, d, o, r = 256, 768, 768, 16
    assert merged(SQUARE) == Cost(2 * n * d * o, 4 * (d * o + n * (d + o)), 1)
    apart = factored(SQUARE) + shrink(SQUARE)
    assert apart.flops == 2 * n * d * o + 2 * n * r * (d + o)
    elements = d * o + r * (d + o) + 2 * n * d + 2 * n * r + 5 * n * o
    assert (apart.bytes, apart.calls) == (4 * elements, 4)
    joined = augmented(SQUARE) + shrink(SQUARE)
    assert joined.flops == apart.flops
    elements = d * o + r * (d + o) + n * d + n * r + 3 * n * (d + r) + n * o
    assert (joined.bytes, joined.calls) == (4 * elements, 3)
    made = weight(SQUARE)
    assert made.flops == 2 * n * d * o + 2 * d * r * o


def test_a_bias_is_a_pass_over_the_result_or_a_row() -> None:
    biased = replace(SQUARE, biased=True, r=8)
    for form in (factored, augmented):
        apart, inside = form(biased), form(biased, ones=True)
        assert apart.bytes - inside.bytes == pytest.approx(4 * 2 * 256 * 768, rel=0.02)
        assert inside.calls == apart.calls - 1


def test_a_narrow_product_costs_a_panel() -> None:
    one, panel = (cost.product(7, 5, columns, 4).flops for columns in (1, cost.PANEL))
    assert one == panel == 2 * 7 * 5 * cost.PANEL
    assert cost.product(7, 5, cost.PANEL + 1, 4).flops == 2 * panel


def test_no_form_is_below_the_limit() -> None:
    assert SQUARE.rho == pytest.approx(16 * 2 / 768)
    for form in (factored, augmented):
        whole = form(SQUARE) + shrink(SQUARE)
        assert whole.flops / merged(SQUARE).flops == pytest.approx(1 + SQUARE.rho)
        assert whole.work / merged(SQUARE).work > 1 + SQUARE.rho


@pytest.mark.parametrize(
    ("d", "o", "better"),
    [(768, 768, "augmented"), (384, 1536, "augmented"), (1536, 384, "factored")],
)
def test_the_better_form_is_the_one_that_was_measured(d: int, o: int, better: str) -> None:
    shape = LayerShape(256, d, o, 8)
    works = {form.__name__: form(shape, ones=True).work for form in (factored, augmented)}
    assert min(works, key=works.__getitem__) == better


def test_a_weight_made_at_each_call_pays_for_many_rows_alone() -> None:
    def saved(n: int) -> float:
        shape = replace(SQUARE, n=n, r=8)
        return (factored(shape) + shrink(shape)).work - weight(shape).work

    assert saved(64) < 0 < saved(4096)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ones", [False, True])
def test_a_trace_counts_what_a_hand_does(shape: LayerShape, ones: bool) -> None:
    n, d, o, r, size = shape.n, shape.d, shape.o, shape.r + ones, shape.size
    passes = cost.moved(2 * n * o, size) if shape.biased and not ones else Cost()
    base = cost.product(n, d, o, size)
    low = cost.product(n, r, o, size) + cost.moved(3 * n * o, size)
    assert factored(shape, ones) == base + low + passes
    joined = cost.moved(2 * n * (d + r), size) + cost.product(n, d + r, o, size)
    assert augmented(shape, ones) == joined + passes
    ones_added = cost.moved(2 * n * r, size) if ones else Cost()
    assert cost_of_shrink(shape, (r,), ones) == cost.product(n, d, r, size) + ones_added
    cut = cost.product(n, d, 3 * r, size) + cost.moved(2 * n * 3 * r, size)
    assert cost_of_shrink(shape, (r, r, r)) == cut
    if not ones:
        made = cost.product(d, r, o, size) + cost.moved(3 * d * o, size)
        assert weight(shape) == made + cost.moved(2 * d * o, size) + merged(shape)


def test_any_other_call_is_a_pass_over_memory_and_a_view_or_a_constant_is_free() -> None:
    def odd(base: Any, narrow: Any, up: Any) -> Any:
        turned = aten.t.default(aten.t.default(narrow))
        sharp = aten.exp.default(aten.log.default(aten.abs.default(up)))
        return forms.factored(base, aten.tanh.default(turned), sharp)

    more = cost.moved(2 * SQUARE.n * SQUARE.r, SQUARE.size)
    assert cost_of(odd, SQUARE) == factored(SQUARE) + more
    given = cost.moved(2 * SQUARE.r * SQUARE.o, SQUARE.size)
    total = factored(SQUARE) + more
    for _ in range(4):  # B comes at each call: three calls of it, and what is made is laid out
        total += given
    assert cost_of(odd, SQUARE, slots=True) == total
