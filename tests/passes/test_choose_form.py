"""Every form of a branch computes the same numbers, folds, and goes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lora_fx import (
    Adapter,
    AdapterError,
    LoraConfig,
    PassError,
    Update,
    adapter_from,
    fold,
    inject,
    text,
    trace,
    unfold,
)
from lora_fx.branch_lowering.selection import FACTORED, Form
from lora_fx.graph.graph_module import targets
from lora_fx.graph.lazy_tensor import get_unevaluated
from lora_fx.injection.branches import branches
from lora_fx.passes import ChooseForm, StripLora
from lora_fx.testing import check_pass, folds_to, make_adapter, relative, tiny

FORMS = [Form(kind, ones) for kind in ("factored", "augmented") for ones in (False, True)]
ALONE = """\
x = input()
matmul = matmul(x, wide.lora_shrink)
add = add(matmul, wide.lora_ones)
cat = cat([x, add], -1)
linear = linear(cat, wide.weight)
tanh = tanh(linear)
matmul_1 = matmul(tanh, again.lora_shrink)
cat_1 = cat([tanh, matmul_1], -1)
linear_1 = linear(cat_1, again.weight)
tanh_1 = tanh(linear_1)
matmul_2 = matmul(tanh_1, again.lora_shrink)
cat_2 = cat([tanh_1, matmul_2], -1)
linear_2 = linear(cat_2, again.weight)
sigmoid = sigmoid(linear_2)
dropout = dropout(sigmoid, 0.5, False)
linear_3 = linear(dropout, narrow.weight)
return [linear_3]"""
TOGETHER = """\
x = input()
matmul = matmul(x, part.lora_shrink)
add = add(matmul, part.lora_ones)
split_with_sizes = split_with_sizes(add, [3, 3, 2], -1)
getitem = getitem(split_with_sizes, 0)
getitem_1 = getitem(split_with_sizes, 1)
getitem_2 = getitem(split_with_sizes, 2)
cat = cat([x, getitem], -1)
linear = linear(cat, part.query.weight)
cat_1 = cat([x, getitem_1], -1)
linear_1 = linear(cat_1, part.key.weight)
mul = mul(linear, linear_1)
cat_2 = cat([x, getitem_2], -1)
linear_2 = linear(cat_2, part.value.weight)
add_1 = add(mul, linear_2)
return [add_1]"""
SHAPES = {"wide": (5, 3), "again": (5, 5)}
AUGMENTED = Form("augmented", ones=True)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(3, 5), nn.Linear(3, 5)
        self.value = nn.Linear(3, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.query(x) * self.key(x) + self.value(x)


class Siblings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Part()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x)


class Together(nn.Module):
    def __init__(self, ragged: nn.Module, siblings: nn.Module) -> None:
        super().__init__()
        self.ragged, self.siblings = ragged, siblings

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.siblings(x), self.ragged(x)], -1)


@pytest.fixture
def siblings(x: torch.Tensor) -> Any:
    torch.manual_seed(0)
    shapes = {f"part.{name}": (5, 3) for name in ("query", "key", "value")}
    base = trace(Siblings().requires_grad_(False).eval(), (x,))
    return base, inject(base, make_adapter(shapes))


def test_a_layer_and_its_branch_become_one_layer(ragged: Any, x: Any) -> None:
    gm = trace(ragged, (x,))
    injected = inject(gm, make_adapter(SHAPES))
    step = ChooseForm(form=AUGMENTED)
    seen = check_pass(step, injected, x, expected=injected(x), control=gm(x))
    assert seen.after == ALONE
    assert ChooseForm()(seen.gm).modified is False
    assert [edit.path for edit in seen.result.edits] == ["wide", "again", "again"]


def test_layers_that_read_one_x_share_a_shrink(siblings: Any, x: Any) -> None:
    base, injected = siblings
    step = ChooseForm(form=AUGMENTED)
    seen = check_pass(step, injected, x, expected=injected(x), control=base(x))
    assert seen.after == TOGETHER
    assert "one shrink for 3 layers" in str(seen.result.edits[0])
    apart = check_pass(ChooseForm(share=False), injected, x, expected=injected(x), control=base(x))
    assert "split_with_sizes" not in apart.after


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_keeps_the_numbers(form: Form, share: bool, siblings: Any, x: Any) -> None:
    base, injected = siblings
    expected = injected(x)
    step = ChooseForm(form=form, share=share)
    chosen = check_pass(step, injected, x, expected=expected, control=base(x)).gm
    assert text(unfold(chosen)) == text(injected)
    assert relative(unfold(chosen)(x), expected) == 0


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_folds_to_the_base(form: Form, share: bool, siblings: Any, x: Any) -> None:
    base, injected = siblings
    chosen = ChooseForm(form=form, share=share)(injected).graph_module
    folded = folds_to(chosen, base)
    assert relative(folded(x), fold(injected)(x)) <= 1e-6
    assert relative(folded(x), base(x)) > 1e-2


def test_an_adapter_whose_branches_went_into_layers_in_part_is_read_unfolded(
    ragged: Any, x: Any
) -> None:
    """What stands beside its layer still would be taken for all of it."""
    base = trace(Together(ragged, Siblings()).eval(), (x,))
    shapes = {"siblings.part.query": (5, 3), "siblings.part.key": (5, 3), "ragged.narrow": (7, 5)}
    injected = inject(base, make_adapter(shapes))
    chosen = ChooseForm(form=Form("factored"))(injected).graph_module
    assert [branch.path for branch in branches(chosen)] == ["ragged.narrow"]
    with pytest.raises(AdapterError, match=r"part\.query, \S+key are folded"):
        adapter_from(chosen)
    for whole in (injected, unfold(chosen)):
        assert relative(inject(base, adapter_from(whole))(x), injected(x)) == 0
    left = StripLora("french")(injected).graph_module
    with pytest.raises(AdapterError, match="holds no adapter"):
        adapter_from(left)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_transposed_weight(form: Form) -> None:
    ids = torch.arange(14).reshape(2, 7)
    base = trace(tiny("GPT2LMHeadModel").eval(), (), {"input_ids": ids})
    injected = inject(base, LoraConfig(r=2, alpha=3, target_modules=["c_attn", "c_fc"], seed=0))
    with torch.no_grad():
        for name, parameter in injected.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    result = ChooseForm(form=form)(injected)
    logits = injected(input_ids=ids).logits
    assert relative(result.graph_module(input_ids=ids).logits, logits) <= 1e-5
    assert relative(logits, base(input_ids=ids).logits) > 1e-2
    assert result.modified == (form != FACTORED)


def test_several_branches_with_biases_are_one(ragged: Any, x: Any) -> None:
    update = Update(torch.randn(3, 3), torch.randn(5, 3), 2.0, bias=torch.randn(5))
    gm = trace(ragged, (x,))
    both = inject(gm, [make_adapter({"wide": (5, 3)}), Adapter("german", {"wide": update})])
    for form in FORMS:
        seen = check_pass(ChooseForm(form=form), both, x, expected=both(x), control=gm(x))
        assert branches(seen.gm) == []
        assert seen.gm.wide.lora_shrink.shape == (3, 5 + form.ones)
    one = StripLora("german")(both).graph_module
    assert relative(one(x), both(x)) > 1e-2


def test_no_weight_is_computed_before_it_is_read(siblings: Any) -> None:
    _, injected = siblings
    chosen = ChooseForm(form=AUGMENTED)(injected).graph_module
    weights = [
        get_unevaluated(chosen, target) for target in targets(chosen.graph) if "weight" in target
    ]
    assert [weight._cached for weight in weights] == [None] * 3


def test_a_weight_that_others_read_is_not_held_twice(shared: Any, x: Any) -> None:
    gm = trace(shared, (x,))
    update = Update(torch.randn(2, 3), torch.randn(5, 2), 1.0)
    injected = inject(gm, Adapter("a", {"one": update}))
    assert ChooseForm(form=AUGMENTED)(injected).modified is False


def test_what_is_no_plain_branch_stays(ragged: Any, x: Any) -> None:
    gm = trace(ragged, (x,))
    magnitude = torch.rand(5) + 1
    dora = Update(torch.randn(2, 3), torch.randn(5, 2), 1.0, magnitude=magnitude)
    assert ChooseForm(form=AUGMENTED)(gm).modified is False
    injected = inject(gm, Adapter("a", {"wide": dora}))
    assert ChooseForm(form=AUGMENTED)(injected).modified is False


def test_training_dropout_stays_and_that_of_eval_mode_goes(ragged: Any, x: Any) -> None:
    config = LoraConfig(r=2, target_modules=["wide"], dropout=0.5)
    training = inject(trace(ragged), config).train()
    assert ChooseForm(form=AUGMENTED)(training).modified is False
    chosen = ChooseForm(form=AUGMENTED)(training.eval())
    assert "lora_dropout" not in text(chosen.graph_module)


def test_a_trained_factor_is_read_at_once(ragged: Any, x: Any) -> None:
    tuned = inject(trace(ragged, (x,)), LoraConfig(r=2, target_modules=["wide"], seed=0))
    up = dict(tuned.named_parameters())["wide.lora_B.default"]
    with torch.no_grad():
        up.fill_(1.0)
    chosen, before = ChooseForm(form=AUGMENTED)(tuned).graph_module, tuned(x)
    with torch.no_grad():
        up.fill_(-1.0)
    assert relative(chosen(x), before) <= 1e-5
    assert relative(tuned(x), before) > 1e-2


def test_a_weight_that_changes_before_it_is_read_is_refused(siblings: Any, x: Any) -> None:
    base, injected = siblings
    chosen = ChooseForm(form=AUGMENTED)(injected).graph_module
    with torch.no_grad():
        base.part.key.weight.mul_(2)
    chosen.part.query.weight.sum()
    with pytest.raises(PassError, match=r"^part\.key\.weight was changed in place"):
        chosen(x)
    again = ChooseForm(form=AUGMENTED)(injected).graph_module
    assert relative(again(x), injected(x)) <= 1e-5


@pytest.mark.parametrize("rows", [2, 512])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_slots_of_several_branches_are_read_by_name(rows: int, scale: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, rows, 64)
    gm = trace(nn.Sequential(nn.Linear(64, 48)).eval(), (x,))
    update = Update(torch.randn(3, 64), torch.randn(48, 3), scale)
    both = inject(gm, [make_adapter({"0": (48, 64)}), Adapter("german", {"0": update})])
    seen = check_pass(ChooseForm(target="input"), both, x, expected=both(x), control=gm(x))
    assert seen.result.modified == (rows == 512)
    names = {f"0.lora_{part}.{name}" for part in "AB" for name in ("french", "german")}
    assert names <= set(targets(seen.gm.graph))
    assert "lora_shrink" not in seen.after


@pytest.mark.parametrize("rows", [2, 512])
def test_slots_stay_as_they_are_but_for_many_rows(rows: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, rows, 64)
    gm = trace(nn.Sequential(nn.Linear(64, 48)).eval(), (x,))
    injected = inject(gm, make_adapter({"0": (48, 64)}))
    step = ChooseForm(target="input")
    seen = check_pass(step, injected, x, expected=injected(x), control=gm(x))
    assert seen.result.modified == (rows == 512)
    read = set(targets(seen.gm.graph))
    assert {"0.lora_A.french", "0.lora_B.french"} <= read


def test_an_unknown_form_is_refused(ragged: Any) -> None:
    with pytest.raises(PassError, match="form='augmentd': expected one of factored, augmented, w"):
        ChooseForm(form=Form("augmentd"))(trace(ragged))
    assert ChooseForm(form=Form("weight"))(trace(ragged)).modified is False


def test_an_unknown_target_is_refused(ragged: Any) -> None:
    with pytest.raises(PassError, match="target='slots'"):
        ChooseForm(target="slots")(trace(ragged))
