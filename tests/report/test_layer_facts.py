"""What an adapter does to each layer, against the numbers of dense matrices."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from torch import fx, nn

import lora_fx
from lora_fx import Adapter
from lora_fx.branch_lowering.cost import Cost
from lora_fx.report.layer_facts import LayerFacts, effective_rank, layer_facts
from lora_fx.report.stages import Stages
from lora_fx.testing import (
    UPDATES,
    Attention,
    Between,
    Computes,
    Experts,
    Notebook,
    make_adapter,
    relative,
    update_of,
)


def facts(gm: fx.GraphModule, target: str = "constant") -> list[LayerFacts]:
    return layer_facts(Stages.of(gm), target)


def dense_facts(delta: torch.Tensor, weight: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The change and the spectrum, of matrices that were made."""
    values = torch.linalg.svdvals(delta.double().flatten(1))
    return float(delta.double().norm() / weight.double().norm()), values


def agrees(fact: LayerFacts, delta: torch.Tensor, weight: torch.Tensor) -> bool:
    change, values = dense_facts(delta, weight)
    found = torch.tensor(fact.singular_values, dtype=torch.float64)
    count = min(len(found), len(values))
    same = relative(found[:count], values[:count]) <= 1e-5 and float(values[count:].norm()) < 1e-5
    return same and fact.change is not None and math.isclose(fact.change, change, rel_tol=1e-5)


@pytest.mark.parametrize("kind", UPDATES)
def test_each_kind_is_measured_by_what_it_makes_of_the_weight(kind: str) -> None:
    torch.manual_seed(0)
    update = update_of(kind, (6, 8))
    out, into = (size or own for size, own in zip(update.shape, (6, 8), strict=True))
    model = Between(nn.Linear(into, out)).eval()
    tuned = lora_fx.inject(
        lora_fx.trace(model, (torch.randn(5, into),)), Adapter("a", {"layer": update})
    )
    weight = model.layer.weight.detach()  # type: ignore[operator,union-attr]
    delta = update.weight(weight) - weight
    for given, form in ((tuned, None), (lora_fx.fold(tuned), "merged")):
        (fact,) = facts(given)
        assert (fact.path, fact.layer, fact.kind) == ("layer", "linear", update.kind)
        assert agrees(fact, delta, weight)
        assert not agrees(fact, 1.1 * delta, weight), "the control: a scale off by 10 %"
        assert form is None or fact.form == form
        assert fact.error is None or fact.error <= 1e-5


@pytest.mark.parametrize("layer", [
    nn.Conv2d(4, 6, 3), nn.Conv1d(4, 6, 2), nn.ConvTranspose2d(4, 6, 2), nn.Embedding(4, 6),
    nn.Linear(4, 6, bias=False),
])  # fmt: skip
def test_each_layer_is_measured_by_its_own_weight(layer: nn.Module) -> None:
    sizes = {"Conv1d": (2, 4, 9), "Linear": (2, 4)}.get(type(layer).__name__, (2, 4, 9, 9))
    x = torch.tensor([[1, 2]]) if isinstance(layer, nn.Embedding) else torch.randn(sizes)
    weight: Any = layer.weight
    turned = isinstance(layer, nn.Embedding | nn.ConvTranspose2d)
    own = (weight.transpose(0, 1) if turned else weight).detach()
    adapter = make_adapter({"layer": tuple(own.shape)}, scale=0.3)
    update: Any = adapter.updates["layer"]
    gm = lora_fx.inject(lora_fx.trace(Between(layer).eval(), (x,)), adapter)
    for given in (gm, lora_fx.fold(gm)):
        (fact,) = facts(given)
        assert agrees(fact, update.delta(), own)
        assert not agrees(fact, update.delta(), 2 * own)
        assert fact.shape == list(own.shape)
        assert fact.error is not None
        assert fact.error <= 1e-5


def test_lora_that_somebody_wrote_into_a_model_is_measured_too() -> None:
    torch.manual_seed(0)
    model = Notebook().eval()
    gm = lora_fx.trace(model, (torch.randn(5, 6),))
    for given, form in ((gm, "augmented"), (lora_fx.fold(gm), "merged")):
        (fact,) = facts(given)
        assert (fact.path, fact.rank, fact.form.partition(",")[0]) == ("fc", 2, form)
        assert agrees(fact, 1.5 * (model.a @ model.b).detach(), model.fc.weight.detach())


def test_a_packed_projection_counts_once() -> None:
    gm = lora_fx.trace(Attention(8).eval(), (torch.randn(2, 3, 8),))
    tuned = lora_fx.inject(gm, make_adapter({"layer": (24, 8), "layer.out_proj": (8, 8)}))
    for given in (tuned, lora_fx.fold(tuned)):
        assert [fact.path for fact in facts(given)] == ["layer", "layer.out_proj"]


def test_experts_have_one_spectrum() -> None:
    model = Experts().eval()
    gm = lora_fx.trace(model, (torch.randn(3, 2, 4),))
    update = replace(update_of("full", (3, 6, 4)), bias=None)  # a parameter has no place for it
    (fact,) = facts(lora_fx.inject(gm, Adapter("e", {"up_proj": update})))
    weight = model.up_proj.detach()
    assert fact.change == pytest.approx(
        float((update.weight(weight) - weight).norm() / weight.norm())
    )


def test_rounding_to_half_loses_what_is_small() -> None:
    torch.manual_seed(0)
    model, x = Between(nn.Linear(16, 16)).eval().half(), torch.randn(2, 16).half()
    gm = lora_fx.trace(model, (x,))
    errors = {}
    for scale in (1.0, 1e-4):
        tuned = lora_fx.inject(gm, make_adapter({"layer": (16, 16)}, scale=scale))
        (merged,), (beside,) = facts(lora_fx.fold(tuned)), facts(tuned)
        errors[scale] = merged.error, beside.error
    weight, update = model.layer.weight.detach(), make_adapter({"layer": (16, 16)}, scale=1e-4)
    delta = update.updates["layer"].weight(weight).double() - weight.double()  # type: ignore[attr-defined]
    lost = (weight.double() + delta).half().double() - weight.double() - delta
    assert errors[1e-4][0] == pytest.approx(float(lost.norm() / delta.norm()), rel=1e-3)
    assert errors[1e-4][0] > 0.05 > 1e-3 > errors[1.0][0], "merged, a small update is lost"
    assert max(errors[1e-4][1], errors[1.0][1]) < 1e-3, "beside the layer, none is"


def test_what_is_replaced_whole_and_what_two_adapters_change() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4)).eval()
    head, norm = torch.randn(4, 5), torch.rand(5)
    first = replace(
        make_adapter({"0": (5, 6)}, name="one"), replacements={"2.weight": head, "1.weight": norm}
    )
    gm = lora_fx.trace(model, (torch.randn(2, 6),))
    tuned = lora_fx.inject(gm, [first, make_adapter({"0": (5, 6)}, rank=3, name="two")])
    found = {(fact.adapter, fact.path): fact for fact in facts(tuned)}
    assert list(found) == [("one", "0"), ("one", "2.weight"), ("one", "1.weight"), ("two", "0")]
    weight = model[2].weight.detach()
    assert agrees(found["one", "2.weight"], head - weight, weight)
    vector = found["one", "1.weight"]
    assert (vector.effective_rank, vector.singular_values) == (None, [])
    given = {fact.path: fact for fact in facts(tuned, "input") if fact.kind == "replaced"}
    assert {fact.form for fact in given.values()} == {"slot, whole"}
    assert given["2.weight"].cost == Cost(0.0, 4 * 2 * 4 * 5, 1), "it is laid out at each call"
    assert given["1.weight"].cost == Cost()
    assert vector.change == pytest.approx(float((norm - 1).norm() / math.sqrt(5)), rel=1e-6)
    assert [found[name, "0"].error for name in ("one", "two")] == [None, None]


def test_what_was_trained_is_measured_as_it_is_now() -> None:
    model = nn.Sequential(nn.Linear(6, 5)).eval()
    tuned = lora_fx.inject(
        lora_fx.trace(model, (torch.randn(2, 6),)), lora_fx.LoraConfig(r=2, target_modules=["0"])
    )
    (fresh,) = facts(tuned)
    assert (fresh.change, fresh.effective_rank) == (0.0, 0.0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    (trained,) = facts(tuned)
    update: Any = lora_fx.adapter_from(tuned).updates["0"]
    assert agrees(trained, update.delta(), model[0].weight.detach())


def scaled() -> Computes:
    """A layer whose outputs the model multiplies, and one that it leaves alone."""
    torch.manual_seed(0)
    return Computes(
        lambda m, x: m.last(torch.tanh(m.fc(x) * m.factor)),
        {"factor": (5,)},
        fc=nn.Linear(6, 5),
        last=nn.Linear(5, 3),
    ).eval()


def test_what_fold_makes_of_the_model_itself_is_said_to_be_that() -> None:
    model: Any = scaled()
    gm = lora_fx.trace(model, (torch.randn(2, 6),))
    assert facts(gm) == []
    (fact,) = facts(lora_fx.fold(gm))
    assert (fact.path, fact.kind, fact.adapter) == ("fc", "folded", "(the model)")
    weight = model.fc.weight.detach()
    assert agrees(fact, model.factor.detach()[:, None] * weight - weight, weight)


def test_an_adapter_that_is_folded_with_more_has_no_error_of_its_own() -> None:
    model: Any = scaled()
    adapter = make_adapter({"fc": (5, 6), "last": (3, 5)})
    tuned = lora_fx.inject(lora_fx.trace(model, (torch.randn(2, 6),)), adapter)
    mixed, alone = facts(lora_fx.fold(tuned))
    update: Any = adapter.updates["fc"]
    assert agrees(mixed, update.delta(), model.fc.weight.detach())
    assert (mixed.kind, mixed.form, mixed.error) == ("lora", "merged", None)
    assert alone.error is not None
    assert alone.error <= 1e-5
    beside = facts(tuned)[0]
    assert beside.error is not None
    assert beside.error <= 1e-5


@pytest.mark.parametrize("chosen", ["use_dora", "loha"])
def test_a_model_that_peft_wrapped_is_measured_when_it_is_folded(chosen: str) -> None:
    torch.manual_seed(0)
    config: Any = (
        peft.LoraConfig(r=2, target_modules=["0"], use_dora=True, init_lora_weights=False)
        if chosen == "use_dora"
        else peft.LoHaConfig(r=2, target_modules=["0"], init_weights=False)
    )
    wrapped = peft.get_peft_model(nn.Sequential(nn.Linear(8, 6), nn.Tanh()), config).eval()
    gm = lora_fx.trace(wrapped.get_base_model(), (torch.randn(3, 8),))
    weight = wrapped.get_base_model()[0].base_layer.weight.detach().clone()
    (fact,) = facts(lora_fx.fold(gm))
    merged = wrapped.merge_and_unload()[0].weight.detach()
    assert (fact.path, fact.kind, fact.form) == ("0.base_layer", "folded", "merged")
    assert agrees(fact, merged - weight, weight)


def test_a_weight_that_no_module_of_its_own_holds_is_passed_over_when_it_is_folded() -> None:
    torch.manual_seed(0)
    model = Computes(
        lambda m, x: torch.tanh(x @ m.matrix * m.factor), {"matrix": (6, 5), "factor": (5,)}
    ).eval()
    assert facts(lora_fx.fold(lora_fx.trace(model, (torch.randn(2, 6),)))) == []


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_base_that_is_not_finite_is_told_and_not_measured(kind: str) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh()).eval()
    tuned = lora_fx.inject(
        lora_fx.trace(model, (torch.randn(2, 8),)), make_adapter({"0": (6, 8)}, kind=kind)
    )
    with torch.no_grad():
        model[0].weight[0, 0] = float("inf")  # type: ignore[operator,index]
    (fact,) = facts(tuned)
    assert (fact.path, fact.kind) == ("0", kind)
    assert fact.change in (None, 0.0)
    assert bool(fact.singular_values) is (kind == "lora"), "only DoRA hangs on the weight"


def test_the_form_and_its_cost_are_those_that_an_export_chooses() -> None:
    model = nn.Sequential(nn.Linear(64, 32)).eval()
    tuned = lora_fx.inject(
        lora_fx.trace(model, (torch.randn(2, 64),)), make_adapter({"0": (32, 64)})
    )
    (beside,), (merged,), (slot,) = facts(tuned), facts(lora_fx.fold(tuned)), facts(tuned, "input")
    assert f"unmerged: {beside.form} (" in lora_fx.explain(tuned)[0]
    assert f"{beside.form} +{beside.cost}" in lora_fx.explain(tuned)[0]
    assert merged.cost is not None
    assert (merged.form, merged.cost.work, slot.form) == ("merged", 0.0, "slot, factored")


def test_effective_rank_is_of_equal_values_their_count() -> None:
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([3.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    mixed = torch.tensor([2.0, 1.0, 1.0])
    shares = [0.5, 0.25, 0.25]
    assert effective_rank(mixed) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
