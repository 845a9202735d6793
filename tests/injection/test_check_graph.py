from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from lora_fx import (
    Adapter,
    AdapterError,
    LoraConfig,
    Update,
    fold,
    inject,
    text,
    trace,
    unfold,
)
from lora_fx.adapters.target_rule import TargetRule
from lora_fx.injection.bind import bind
from lora_fx.injection.branches import adapters_beside
from lora_fx.injection.check_graph import check_binding, check_reached, fresh_targets
from lora_fx.layers.base_layers import layers_in
from lora_fx.layers.sites import by_path
from lora_fx.testing import Computes, make_adapter, relative


def checked(gm: Any, adapter: Adapter, strict: bool) -> dict[str, str]:
    groups = by_path(gm)
    layers = layers_in(gm, groups)
    binding = bind(layers, adapter)
    beside = adapters_beside(groups, binding.updates)
    return check_binding(gm, binding, layers, groups, beside, strict)


def targets(gm: Any, config: LoraConfig) -> list[str]:
    groups = by_path(gm)
    return list(fresh_targets(gm, config, layers_in(gm, groups), groups))


def test_what_does_not_match_is_returned_with_its_reason(ragged: Any) -> None:
    gm = trace(ragged)
    updates = make_adapter({"wide": (5, 3), "head": (5, 3)}).updates
    adapter = Adapter("a", updates, {"gone.bias": torch.ones(5)}, TargetRule(["wide", "again"]))
    assert set(checked(gm, adapter, strict=False)) == {"head", "gone.bias", "again"}
    with pytest.raises(
        AdapterError, match=r"2 targets match nothing in the graph: head, gone.bias"
    ):
        checked(gm, adapter, strict=True)


def test_an_adapter_that_fits_leaves_nothing_over(ragged: Any) -> None:
    gm = trace(ragged)
    adapter = make_adapter({"wide": (5, 3), "again": (5, 5)})
    assert checked(gm, adapter, strict=True) == {}


@pytest.mark.parametrize("name", ["train", "half", "weight", "is"])
def test_a_name_that_torch_or_python_has_taken_fits(name: str, ragged: Any) -> None:
    gm = trace(ragged)
    update = Update(torch.ones(2, 3), torch.ones(5, 2), 1.0)
    assert checked(gm, Adapter(name, {"wide": update}), strict=True) == {}


def test_a_config_chooses_layers_by_its_rule(ragged: Any) -> None:
    gm = trace(ragged)
    config = LoraConfig(r=2, exclude_modules=["narrow"])
    assert targets(gm, config) == ["wide", "again"]


def test_all_linear_means_modules_and_not_bare_weights(shared: Any) -> None:
    gm = trace(shared)
    assert set(by_path(gm)) == {"one", "two", "weight", "one.weight"}
    assert set(targets(gm, LoraConfig(r=2))) == {"one", "two"}
    chosen = targets(gm, LoraConfig(r=2, target_modules=["weight"]))
    assert set(chosen) == {"weight", "one.weight"}


def test_a_name_that_a_parameter_has_is_refused() -> None:
    class Holds(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 3)
            self.lora_A = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lora_A(super().forward(x))

    gm = trace(nn.Sequential(Holds()))
    adapter = Adapter("weight", {"0": Update(torch.ones(2, 3), torch.ones(3, 2), 1.0)})
    with pytest.raises(AdapterError, match=r"0\.lora_A\.weight, names that the model"):
        checked(gm, adapter, strict=True)


@pytest.mark.parametrize("frontend", ["export", "symbolic"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 5)),
        lambda: nn.utils.weight_norm(nn.Conv1d(7, 5, 1)),
        lambda: prune.l1_unstructured(nn.Linear(3, 5), "weight", 0.5),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_weight_that_is_computed_at_each_call_is_named(make: Any, frontend: Any) -> None:
    model = nn.Sequential(make(), nn.Tanh()).eval()
    gm = trace(model, (torch.randn(4, 7, 3),), frontend=frontend)
    reason = r"What 0 multiplies .* each call.*remove_parametrizations .*_norm and prune\.remove"
    with pytest.raises(AdapterError, match=reason):
        checked(gm, make_adapter({"0": (5, 3)}), strict=True)
    for wanted in (["0"], "all-linear"):
        with pytest.raises(AdapterError, match=reason):
            targets(gm, LoraConfig(r=2, target_modules=wanted))
    with pytest.raises(AdapterError) as error:
        targets(gm, LoraConfig(r=2, target_modules=["1"]))
    assert "computed" not in str(error.value)


@pytest.mark.parametrize("wanted", [["inner"], "all-linear"])
def test_a_layer_in_a_branch_is_named_by_a_config_too(wanted: Any) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> Any:
            return torch.cond(x.sum() > 0, lambda x: self.inner(x), torch.sin, (x,))

    gm = trace(Branching().eval(), (torch.randn(4, 3),))
    with pytest.raises(AdapterError, match=r"inner\.weight, .* is read in a block of its own"):
        targets(gm, LoraConfig(r=2, target_modules=wanted))


FINE: dict[str, Any] = {
    "all parts": lambda x, w: F.linear(x, w[:3]) + F.linear(x, w[3:]),
    "a part that nobody reads": lambda x, w: F.linear(x, w[:3]),
    "its sizes": lambda x, w: F.linear(x, w[: w.shape[0] // 2]),
    "its sizes beside": lambda x, w: F.linear(x, w[:3]) * w.size(0),
    "drawn from for nobody": lambda x, w: (F.dropout(w), F.linear(x, w[:3]))[1],
}
MISSED: dict[str, Any] = {
    "scaled": lambda x, w: F.linear(x, w[:3]) + F.linear(x, w[3:] * 2),
    "summed": lambda x, w: F.linear(x, w[:3]) + w.sum(),
    "given out": lambda x, w: (F.linear(x, w[:3]), w),
    "the whole, summed": lambda x, w: F.linear(x, w) + w.sum(),
    "the whole, turned round": lambda x, w: F.linear(x, w) + F.linear(x, -w),
    "of a chunk": lambda x, w: F.linear(x, w.chunk(2)[0]) + F.linear(x, w.chunk(2)[1].tanh()),
}


@pytest.mark.parametrize("frontend", ["export", "symbolic"])
@pytest.mark.parametrize("name", [*FINE, *MISSED])
def test_a_part_that_is_read_by_no_layer_is_told(name: str, frontend: str) -> None:
    run = (FINE | MISSED)[name]
    fc = nn.Linear(5, 6, bias=False)
    model = Computes(lambda m, x: run(x, m.fc.weight), fc=fc).eval()
    gm = trace(model, (torch.randn(3, 5),), frontend=frontend)
    if name in FINE:
        check_reached(gm, "fc", by_path(gm))
        return
    with pytest.raises(AdapterError, match=r"^its weight fc\.weight is also read by"):
        check_reached(gm, "fc", by_path(gm))


class Cosine(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) / self.weight.norm(dim=1)


@pytest.mark.parametrize("frontend", ["export", "symbolic"])
def test_what_the_owner_of_a_layer_reads_is_the_base_s(frontend: str) -> None:
    """Beside a call of the layer, as beside PEFT's; what the layer itself reads is the update's."""

    def check(layer: nn.Module) -> None:
        model = Computes(lambda m, x: m.fc(x) + m.fc.weight.sum(), fc=layer).eval()
        gm = trace(model, (torch.randn(3, 5),), frontend=frontend)
        check_reached(gm, "fc", by_path(gm))

    check(nn.Linear(5, 6, bias=False))
    with pytest.raises(AdapterError, match=r"read by \w*norm of fc, "):
        check(Cosine(5, 6, bias=False))


class InBlocks(nn.Module):
    """Two layers of one weight, of which one is also called, or another one, in a block."""

    def __init__(self, inside: str, kind: str) -> None:
        super().__init__()
        self.inside, self.kind = inside, kind
        self.one, self.two = nn.Linear(5, 5), nn.Linear(5, 5)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = getattr(self, self.inside)
        if self.kind == "cond":
            y: torch.Tensor = torch.cond(x.sum() > 0, lambda x: layer(x), torch.sin, (x,))
        else:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = layer(x.sin()).float()
        return self.one(torch.tanh(y))


@pytest.mark.parametrize("kind", ["cond", "autocast"])
def test_a_layer_that_is_called_in_a_block_too_takes_no_adapter(kind: str) -> None:
    """And one whose weight another module reads there does, where the block says whose it is."""
    x = torch.randn(3, 5)
    inside, beside = (trace(InBlocks(name, kind).eval(), (x,)) for name in ("one", "two"))
    with pytest.raises(AdapterError, match=rf"is also read by \S*{kind} of the model itself"):
        inject(inside, make_adapter({"one": (5, 5)}))
    if kind == "autocast":
        tuned = inject(beside, make_adapter({"one": (5, 5)}))
        assert relative(tuned(x), beside(x)) > 1e-2


@pytest.mark.parametrize("frontend", ["export", "symbolic"])
def test_factors_beside_a_weight_that_is_read_both_ways_are_refused(frontend: str) -> None:
    config = LoraConfig(r=2, target_modules=["w"])

    def graph(run: Any) -> Any:
        model = Computes(lambda m, x: run(x, m.w), {"w": (5, 3)}).eval()
        return trace(model, (torch.randn(4, 3),), frontend=frontend)

    inject(graph(lambda x, w: torch.tanh(F.linear(x, w)) @ torch.ones(5, 3)), config)
    with pytest.raises(AdapterError, match=r"one call multiplies .* another with the transpose"):
        inject(graph(lambda x, w: torch.tanh(F.linear(x, w)) @ w), config)


class Around(nn.Module):
    """What a model does around its layer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc, self.how = nn.Linear(3, 5), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., 3) -> (..., 5)."""
        match self.how:
            case "behind":
                return self.fc(x) * 0.25
            case "in front":
                return self.fc(x * 4.0)
            case "parallel":
                return self.fc(x) + 3.0 * self.fc(x)
            case "added":
                return self.fc(x) + 2.0
            case _:
                return self.fc(x).unsqueeze(1).tanh()


@pytest.mark.parametrize("before", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("how", ["behind", "in front", "parallel"])
def test_a_layer_with_a_factor_folded_into_it_takes_no_adapter(how: str, before: bool) -> None:
    x = torch.randn(4, 3)
    gm = trace(Around(how), (x,))
    given = inject(gm, make_adapter({"fc": (5, 3)}, name="first")) if before else gm
    adapter = make_adapter({"fc": (5, 3)})
    folded = fold(fold(given))
    with pytest.raises(AdapterError, match=r"adapter french, fc: .* was folded into its weight"):
        inject(folded, adapter)
    with pytest.raises(AdapterError, match=r"was folded into its weight.*unfold gives it back"):
        inject(folded, LoraConfig(r=2, target_modules=["fc"]))
    assert relative(inject(unfold(folded), adapter)(x), inject(given, adapter)(x)) <= 1e-6


@pytest.mark.parametrize("before", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("how", ["added", "nothing"])
def test_a_layer_that_was_folded_without_a_factor_takes_adapters(how: str, before: bool) -> None:
    x = torch.randn(4, 3)
    gm = trace(Around(how), (x,))
    given = inject(gm, make_adapter({"fc": (5, 3)}, name="first")) if before else gm
    adapter = make_adapter({"fc": (5, 3)})
    wanted = inject(given, adapter)(x)
    assert relative(inject(fold(given), adapter)(x), wanted) <= 1e-6
    assert relative(given(x), wanted) > 1e-2


def test_a_layer_whose_shifted_input_went_into_its_bias_takes_no_adapter() -> None:
    def shifted(m: Any, x: torch.Tensor) -> torch.Tensor:
        wide = torch.baddbmm(m.c, x.transpose(0, 1), m.w).transpose(0, 1)
        y: torch.Tensor = m.fc((wide + 4.0).double()).float()
        return y.tanh()

    parts: Any = {"c": nn.Buffer(torch.randn(4, 1, 3)), "w": nn.Parameter(torch.randn(4, 5, 3))}
    model = Computes(shifted, **parts, fc=nn.Linear(3, 6, dtype=torch.float64)).eval()
    x = torch.randn(2, 4, 5)
    gm = trace(model, (x,))
    folded, adapter = fold(gm), make_adapter({"fc": (6, 3)})
    assert "add(" not in text(folded)
    assert relative(inject(gm, adapter)(x), gm(x)) > 1e-2
    with pytest.raises(AdapterError, match="was folded into its weight"):
        inject(folded, adapter)
