"""What forms there are, and how they and their costs are told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lora_fx import inject, trace
from lora_fx.branch_lowering import cost
from lora_fx.branch_lowering.cost import Shape
from lora_fx.branch_lowering.selection import FACTORED, Form, Group, Member, choices, forms_of
from lora_fx.testing import make_adapter

SHAPE = Shape(256, 768, 768, 8)


@pytest.fixture
def member(ragged: Any, x: Any) -> Member:
    (group,) = choices(inject(trace(ragged, (x,)), make_adapter({"wide": (5, 3)})))
    return group.members[0]


def test_a_form_alone_is_its_expand_and_its_shrink() -> None:
    for kind in ("factored", "augmented"):
        one = Form(kind, ones=True)
        assert one.alone(SHAPE) == one.expand(SHAPE) + cost.shrink(SHAPE, 9, ones=True)
    made = Form("weight")
    assert made.alone(SHAPE) == made.expand(SHAPE) == cost.weight(SHAPE)
    assert [str(form) for form in (FACTORED, Form("augmented", True))] == [
        "factored",
        "augmented, bias in B",
    ]


def test_what_has_no_bias_or_may_not_be_copied_has_fewer_forms(member: Member) -> None:
    assert len(forms_of(member, copies=True)) == 4
    assert forms_of(member, copies=False) == [FACTORED]


def test_a_shared_shrink_is_counted_once(member: Member) -> None:
    member = replace(member, shape=SHAPE)
    alone = Group((member,)).cost
    apart, together = (Group((member,) * 3, shared) for shared in (False, True))
    assert apart.cost == alone + alone + alone
    assert together.cost.bytes < apart.cost.bytes
    assert together.cost.flops < apart.cost.flops  # three narrow products are one panel


def test_the_reason_names_the_form_and_the_others(member: Member) -> None:
    why = Group((member,)).why(member)
    assert why.startswith(f"{member.form} (n = 28; beyond merged: ")
    assert why.count("MFLOP") == 4
    assert "one shrink for 2 layers" in Group((member, member), shared=True).why(member)
