"""The formulas against counts made by hand, and the choice they make against what was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lora_fx.branch_lowering import cost
from lora_fx.branch_lowering.cost import Cost, Shape

SQUARE = Shape(n=256, d=768, o=768, r=16, size=4, biased=False)


def test_costs_add_up() -> None:
    total = Cost(1.0, 2.0, 3) + Cost(10.0, 20.0, 30)
    assert total == Cost(11.0, 22.0, 33)
    assert total.work == 11 + cost.BYTE_FLOPS * 22 + cost.CALL_FLOPS * 33
    assert str(Cost(2e6, 5e5, 4)) == "2 MFLOP, 0.5 MB, 4 calls"


def test_the_formulas_are_those_of_the_definition() -> None:
    n, d, o, r = 256, 768, 768, 16
    assert cost.merged(SQUARE) == Cost(2 * n * d * o, 4 * (d * o + n * (d + o)), 1)
    factored = cost.factored(SQUARE) + cost.shrink(SQUARE)
    assert factored.flops == 2 * n * d * o + 2 * n * r * (d + o)
    elements = d * o + r * (d + o) + 2 * n * d + 2 * n * r + 5 * n * o
    assert (factored.bytes, factored.calls) == (4 * elements, 4)
    augmented = cost.augmented(SQUARE) + cost.shrink(SQUARE)
    assert augmented.flops == factored.flops
    elements = d * o + r * (d + o) + n * d + n * r + 3 * n * (d + r) + n * o
    assert (augmented.bytes, augmented.calls) == (4 * elements, 3)
    made = cost.weight(SQUARE)
    assert made.flops == 2 * n * d * o + 2 * d * r * o


def test_a_bias_is_a_pass_over_the_result_or_a_row() -> None:
    biased = replace(SQUARE, biased=True, r=8)
    for form in (cost.factored, cost.augmented):
        apart, inside = form(biased), form(biased, ones=True)
        assert apart.bytes - inside.bytes == pytest.approx(4 * 2 * 256 * 768, rel=0.02)
        assert inside.calls == apart.calls - 1


def test_a_narrow_product_costs_a_panel() -> None:
    one, panel = (cost.product(7, 5, columns, 4).flops for columns in (1, cost.PANEL))
    assert one == panel == 2 * 7 * 5 * cost.PANEL
    assert cost.product(7, 5, cost.PANEL + 1, 4).flops == 2 * panel


def test_no_form_is_below_the_limit() -> None:
    assert SQUARE.rho == pytest.approx(16 * 2 / 768)
    for form in (cost.factored, cost.augmented):
        whole = form(SQUARE) + cost.shrink(SQUARE)
        assert whole.flops / cost.merged(SQUARE).flops == pytest.approx(1 + SQUARE.rho)
        assert whole.work / cost.merged(SQUARE).work > 1 + SQUARE.rho


@pytest.mark.parametrize(
    ("d", "o", "better"),
    [(768, 768, "augmented"), (384, 1536, "augmented"), (1536, 384, "factored")],
)
def test_the_better_form_is_the_one_that_was_measured(d: int, o: int, better: str) -> None:
    shape = Shape(256, d, o, 8)
    works = {name: getattr(cost, name)(shape, ones=True).work for name in ("factored", "augmented")}
    assert min(works, key=works.__getitem__) == better


def test_a_weight_made_at_each_call_pays_for_many_rows_alone() -> None:
    def saved(n: int) -> float:
        shape = replace(SQUARE, n=n, r=8)
        return (cost.factored(shape) + cost.shrink(shape)).work - cost.weight(shape).work

    assert saved(64) < 0 < saved(4096)
