"""What forms there are, and how they and their costs are told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lora_fx import fold, inject, text, trace, unfold
from lora_fx.branch_lowering import forms
from lora_fx.branch_lowering.cost import LayerShape, cost_of, cost_of_shrink
from lora_fx.branch_lowering.selection import FACTORED, Candidate, Form, Group, choices, forms_of
from lora_fx.graph.ops import aten
from lora_fx.passes import ChooseForm
from lora_fx.testing import check_pass, make_adapter, relative

SHAPE = LayerShape(256, 768, 768, 8)


@pytest.fixture
def member(ragged: Any, x: Any) -> Candidate:
    (group,) = choices(inject(trace(ragged, (x,)), make_adapter({"wide": (5, 3)})))
    return group.members[0]


@pytest.mark.parametrize("ranks", [(2,), (2, 3), (3, 1, 2)])
@pytest.mark.parametrize("ones", [None, 1.5])
def test_a_shrink_gives_each_layer_its_columns(ranks: tuple[int, ...], ones: float | None) -> None:
    draw = torch.Generator().manual_seed(0)
    x, *downs = (torch.randn(4, n, generator=draw) for n in (4, *ranks))
    more = None if ones is None else torch.full((sum(ranks),), ones)
    found = forms.shrink(x, downs, more, ranks)
    assert [narrow.shape for narrow in found] == [(4, rank) for rank in ranks]
    for narrow, down in zip(found, downs, strict=True):
        assert relative(narrow, x @ down + (ones or 0.0)) <= 1e-6


def test_a_form_alone_is_its_expand_and_its_shrink() -> None:
    for kind in ("factored", "augmented"):
        one = Form(kind, ones=True)
        assert one.alone(SHAPE) == one.expand(SHAPE) + cost_of_shrink(SHAPE, (9,), ones=True)
    made = Form("weight")
    assert made.alone(SHAPE) == made.expand(SHAPE) == cost_of(forms.made, SHAPE, slots=True)
    assert [str(form) for form in (FACTORED, Form("augmented", True))] == [
        "factored",
        "augmented, bias in B",
    ]


def test_what_has_no_bias_or_may_not_be_copied_has_fewer_forms(member: Candidate) -> None:
    assert len(forms_of(member, copies=True)) == 4
    assert forms_of(member, copies=False) == [FACTORED]


def test_a_shared_shrink_is_counted_once(member: Candidate) -> None:
    member = replace(member, shape=SHAPE)
    alone = Group((member,)).cost
    apart, together = (Group((member,) * 3, shared) for shared in (False, True))
    assert apart.cost == alone + alone + alone
    assert together.cost.bytes < apart.cost.bytes
    assert together.cost.flops < apart.cost.flops  # three narrow products are one panel


def test_the_reason_names_the_form_and_the_others(member: Candidate) -> None:
    why = Group((member,)).why(member)
    assert why.startswith(f"{member.form} (n = 28; beyond merged: ")
    assert why.count("MFLOP") == 4
    assert "one shrink for 2 layers" in Group((member, member), shared=True).why(member)


def fused(x: Any, weight: Any, bias: Any, down: Any, up: Any) -> Any:
    """``x (W + A B) + b`` of constants: what fold makes, in one line."""
    product = aten.t.default(aten.matmul.default(down, up))
    return forms.merged(x, aten.add.Tensor(weight, product), bias)


def late(x: Any, weight: Any, bias: Any, narrow: Any, up: Any) -> Any:
    """``concat(x, x A) [W; B]``, the bias in a call of its own."""
    y = forms.augmented(x, weight, None, narrow, up)
    return y if bias is None else aten.add.Tensor(y, bias)


def test_a_form_that_is_written_and_named_is_chosen_where_it_costs_least(
    monkeypatch: pytest.MonkeyPatch, ragged: Any, x: Any
) -> None:
    gm = trace(ragged, (x,))
    injected = inject(gm, make_adapter({"wide": (5, 3), "again": (5, 5)}))
    assert {member.form.kind for group in choices(injected) for member in group.members} != {
        "fused"
    }
    monkeypatch.setitem(forms.CONSTANT, "fused", fused)
    seen = check_pass(ChooseForm(), injected, x, expected=injected(x), control=gm(x))
    assert all(edit.text.startswith("fused (n = 28; ") for edit in seen.result.edits)
    assert "lora" not in seen.after
    assert seen.after == text(fold(injected))
    assert text(unfold(seen.gm)) == text(injected)


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("kind", ["late", "fused"])
def test_a_new_form_is_taken_where_it_is_wanted(
    monkeypatch: pytest.MonkeyPatch, ragged: Any, x: Any, kind: str, ones: bool
) -> None:
    monkeypatch.setitem(forms.CONSTANT, kind, globals()[kind])
    gm = trace(ragged, (x,))
    injected = inject(gm, make_adapter({"wide": (5, 3)}))
    step = ChooseForm(form=Form(kind, ones))
    seen = check_pass(step, injected, x, expected=injected(x), control=gm(x))
    assert ("wide.lora_shrink" in seen.after) == (kind == "late")
    assert ("wide.lora_ones" in seen.after) == (kind == "late" and ones)  # no x A, no row in B
    assert relative(fold(seen.gm)(x), injected(x)) <= 1e-5
