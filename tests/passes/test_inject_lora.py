from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lora_fx import (
    Adapter,
    AdapterError,
    AdapterWarning,
    LoraConfig,
    Update,
    adapter_from,
    inject,
    trace,
)
from lora_fx.adapters.target_rule import TargetRule
from lora_fx.passes import InjectLora
from lora_fx.testing import check_pass, make_adapter, relative, zoo

BEFORE = """\
x = input()
linear = linear(x, wide.weight, wide.bias)
tanh = tanh(linear)
linear_1 = linear(tanh, again.weight)
tanh_1 = tanh(linear_1)
linear_2 = linear(tanh_1, again.weight)
sigmoid = sigmoid(linear_2)
dropout = dropout(sigmoid, 0.5, False)
linear_3 = linear(dropout, narrow.weight)
return [linear_3]"""
AFTER = """\
x = input()
linear = linear(x, wide.weight, wide.bias)
matmul = matmul(x, wide.lora_A.french)
matmul_1 = matmul(matmul, wide.lora_B.french)
add = add(linear, matmul_1)
tanh = tanh(add)
linear_1 = linear(tanh, again.weight)
matmul_2 = matmul(tanh, again.lora_A.french)
matmul_3 = matmul(matmul_2, again.lora_B.french)
add_1 = add(linear_1, matmul_3)
tanh_1 = tanh(add_1)
linear_2 = linear(tanh_1, again.weight)
matmul_4 = matmul(tanh_1, again.lora_A.french)
matmul_5 = matmul(matmul_4, again.lora_B.french)
add_2 = add(linear_2, matmul_5)
sigmoid = sigmoid(add_2)
dropout = dropout(sigmoid, 0.5, False)
linear_3 = linear(dropout, narrow.weight)
return [linear_3]"""
SHAPES = {"wide": (5, 3), "again": (5, 5)}


def by_hand(model: nn.Module, adapter: Adapter, factor: float = 1.0) -> nn.Module:
    """The weight form: the deltas added to the weights of a copy."""
    import copy

    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for path, update in adapter.updates.items():
            tuned.get_submodule(path).weight += factor * update.delta()
    return tuned


def test_the_subgraph_and_the_weight_form_agree(ragged: Any, x: Any) -> None:
    adapter = make_adapter(SHAPES)
    gm = trace(ragged, (x,))
    seen = check_pass(
        InjectLora(adapter), gm, x, expected=by_hand(ragged, adapter)(x), control=ragged(x)
    )
    assert (seen.before, seen.after) == (BEFORE, AFTER)
    assert relative(seen.gm(x), by_hand(ragged, adapter, 1.1)(x)) > 1e-3
    assert [str(edit) for edit in seen.result.edits] == [
        "inject wide: lora rank 2, adapter french",
        "inject again: lora rank 2, adapter french",
    ]


def test_the_bias_of_the_up_projection_is_scaled(ragged: Any, x: Any) -> None:
    update = Update(torch.randn(2, 3), torch.randn(5, 2), 3.0, bias=torch.randn(5))
    tuned = by_hand(ragged, Adapter("a", {"wide": update}))
    with torch.no_grad():
        tuned.wide.bias += 3.0 * update.bias
    injected = inject(trace(ragged, (x,)), Adapter("a", {"wide": update}))
    assert relative(injected(x), tuned(x)) <= 1e-6
    read_back = adapter_from(injected).updates["wide"]
    torch.testing.assert_close(read_back.bias, 3.0 * update.bias)


def test_several_adapters_are_summed(ragged: Any, x: Any) -> None:
    one = make_adapter(SHAPES, rank=2)
    two = make_adapter({"wide": (5, 3), "narrow": (7, 5)}, rank=3, name="german")
    both = inject(trace(ragged, (x,)), [one, two])
    assert relative(both(x), by_hand(by_hand(ragged, one), two)(x)) <= 1e-6
    after = inject(inject(trace(ragged, (x,)), one), two)
    assert relative(after(x), both(x)) == 0
    assert set(adapter_from(both, "german").updates) == {"wide", "narrow"}
    with pytest.raises(AdapterError, match="french, german"):
        adapter_from(both)


def test_replaced_parameters_reach_every_call_and_nothing_else(ragged: Any, x: Any) -> None:
    weight, bias = torch.randn(5, 5), torch.randn(5)
    adapter = Adapter("a", {}, {"again.weight": weight, "wide.bias": bias})
    tuned = by_hand(ragged, adapter)
    with torch.no_grad():
        tuned.again.weight.copy_(weight)
        tuned.wide.bias.copy_(bias)
    gm = trace(ragged, (x,))
    assert relative(inject(gm, adapter)(x), tuned(x)) == 0
    assert relative(gm(x), tuned(x)) > 1e-2


def test_a_config_trains_the_branches_alone(ragged: Any, x: Any) -> None:
    config = LoraConfig(r=2, alpha=3, dropout=0.4, target_modules=["wide", "again"], seed=0)
    flags = {name: p.requires_grad for name, p in ragged.named_parameters()}
    gm = inject(trace(ragged), config)
    assert relative(gm(x), ragged(x)) == 0  # up starts at zero
    trained = [name for name, p in gm.named_parameters() if p.requires_grad]
    assert trained == [f"{path}.lora_{side}.default" for path in ("wide", "again") for side in "AB"]
    gm.train()
    torch.optim.SGD([p for p in gm.parameters() if p.requires_grad], lr=0.5)
    optimizer = torch.optim.SGD([p for p in gm.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        gm(x).square().sum().backward()
        optimizer.step()
    assert not torch.equal(gm(x), gm(x))  # dropout is live
    gm.eval()
    adapter = adapter_from(gm)
    assert {path: u.scale for path, u in adapter.updates.items()} == {"wide": 1.5, "again": 1.5}
    assert relative(gm(x), by_hand(ragged, adapter)(x)) <= 1e-6
    assert relative(gm(x), ragged(x)) > 1e-3
    assert {name: p.requires_grad for name, p in ragged.named_parameters()} == flags
    assert all(p.grad is None for p in ragged.parameters())


def test_all_linear_leaves_the_output_embedding_out() -> None:
    _, gm = zoo("qwen2")
    edits = InjectLora(LoraConfig(r=2))(gm).edits
    assert "lm_head" not in {edit.path for edit in edits}
    assert len(edits) == 14


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ({"wider": (5, 3)}, "1 targets match nothing in the graph: wider"),
        ({f"layer{i}": (5, 3) for i in range(12)}, "layer9, and 2 more"),
        ({"wide": (5, 4)}, "made for a layer 4 -> 5, the model's is 3 -> 5"),
    ],
)
def test_an_adapter_for_another_model_is_refused_by_name(
    adapter: Any, says: str, ragged: Any
) -> None:
    with pytest.raises(AdapterError) as caught:
        inject(trace(ragged), make_adapter(adapter))
    assert says in str(caught.value)


def test_what_does_not_match_becomes_an_edit_when_not_strict(ragged: Any, x: Any) -> None:
    result = InjectLora(make_adapter({"wide": (5, 3), "head": (5, 3)}), strict=False)(trace(ragged))
    assert [(edit.action, edit.path) for edit in result.edits] == [
        ("skip", "head"),
        ("inject", "wide"),
    ]
    only = InjectLora(make_adapter({"head": (5, 3)}), strict=False)(trace(ragged))
    assert not only.modified
    assert relative(only.graph_module(x), ragged(x)) == 0


def test_layers_that_the_config_names_and_the_file_lacks(ragged: Any) -> None:
    adapter = make_adapter({"wide": (5, 3)})
    partial = Adapter("a", adapter.updates, expects=TargetRule(["wide", "again"]))
    with pytest.raises(AdapterError, match="no tensors for: again"):
        inject(trace(ragged), partial)
    whole = {"again.weight": 2 * ragged.get_submodule("again").weight.detach()}
    inject(trace(ragged), Adapter("a", adapter.updates, whole, expects=partial.expects))


def test_two_adapters_of_one_name_are_refused(ragged: Any) -> None:
    once = inject(trace(ragged), make_adapter(SHAPES))
    with pytest.raises(AdapterError, match=r"french.*already.*another name="):
        inject(once, make_adapter(SHAPES))


def test_replaced_parameters_must_exist_and_fit(ragged: Any) -> None:
    with pytest.raises(AdapterError, match=r"head\.weight"):
        inject(trace(ragged), Adapter("a", {}, {"head.weight": torch.ones(5, 3)}))
    with pytest.raises(AdapterError, match=r"shape \(3, 5\), the model's is \(5, 3\)"):
        inject(trace(ragged), Adapter("a", {}, {"wide.weight": torch.ones(3, 5)}))


def test_values_that_overflow_the_layers_dtype_are_refused(ragged: Any) -> None:
    update = Update(torch.ones(2, 3), torch.full((5, 2), 60000.0), 4.0)
    with pytest.raises(AdapterError, match=r"wide: adapter a: .*float16.*wider"):
        inject(trace(ragged.half()), Adapter("a", {"wide": update}))


def test_a_config_without_a_target_and_a_thing_that_is_no_adapter(ragged: Any) -> None:
    with pytest.raises(AdapterError, match="match none of the 3"):
        inject(trace(ragged), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match=r"give a list of names, \['narrow'\]"):
        inject(trace(nn.Sequential(ragged)), LoraConfig(target_modules="narrow"))
    with pytest.raises(AdapterError, match=r"of the 3 layers: [^\[]*$"):
        inject(trace(ragged), LoraConfig(target_modules="q_proj"))
    with pytest.raises(AdapterError, match="cannot inject a int"):
        inject(trace(ragged), 3)  # type: ignore[arg-type]


def test_what_all_linear_leaves_of_a_convolutional_network_is_told() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3)]
    gm = trace(nn.Sequential(*layers), (torch.randn(1, 3, 6, 6),))
    with pytest.warns(AdapterWarning, match=r"adapts 4 and leaves out 2 convolutions, 0, 2: give"):
        inject(gm, LoraConfig(r=2))
    one = trace(nn.Sequential(*layers[2:]), (torch.randn(1, 4, 4, 4),))
    inject(one, LoraConfig(r=2))  # as many linear layers: no warning
    inject(gm, LoraConfig(r=2, target_modules=["4"]))
