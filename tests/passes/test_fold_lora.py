from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lora_fx import Adapter, LoraConfig, PassError, Update, fold, inject, text, trace, unfold
from lora_fx.explanation import explain, unmerged
from lora_fx.graph.graph_module import attribute
from lora_fx.graph.lazy_tensor import LazyTensor, get_unevaluated
from lora_fx.layers.sites import sites
from lora_fx.passes import FoldLora
from lora_fx.testing import Computes, check_pass, make_adapter, zoo

SHAPES = {"wide": (5, 3), "again": (5, 5), "narrow": (7, 5)}


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_branches_fold_into_the_layers_they_stand_beside(
    frontend: str, ragged: Any, x: Any
) -> None:
    base = trace(ragged, (x,), frontend=frontend)
    injected = inject(base, make_adapter(SHAPES))
    seen = check_pass(FoldLora(), injected, x, expected=injected(x), control=ragged(x))
    assert seen.after == text(base)
    update = make_adapter(SHAPES).updates["wide"]
    folded = attribute(seen.gm, "wide.weight")
    torch.testing.assert_close(folded, ragged.wide.weight + update.delta())
    again = check_pass(FoldLora(), seen.gm, x)
    assert again.result.edits == ()


def test_several_adapters_fold_into_one_layer(ragged: Any, x: Any) -> None:
    base = trace(ragged, (x,))
    other = make_adapter({"wide": (5, 3)}, rank=3, name="german")
    injected = inject(base, [make_adapter({"wide": (5, 3)}), other])
    one = inject(base, other)(x)
    seen = check_pass(FoldLora(), injected, x, expected=injected(x), control=one)
    assert seen.after == text(base)


PRODUCTS = {
    "last": lambda m, x: x @ (m.w + 1.5 * m.a @ m.b),
    "turned": lambda m, x: x @ (m.w.T + 1.5 * (m.a @ m.b).T).T,
    "mm": lambda m, x: torch.mm(x, torch.addmm(m.w, m.a, m.b, alpha=1.5)),
    "linear": lambda m, x: nn.functional.linear(x, (m.w + 1.5 * m.a @ m.b).T),
}


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("spelled", PRODUCTS)
def test_a_product_with_a_weight_that_is_summed_up_is_one_layer(
    spelled: str, frontend: Any
) -> None:
    """It holds one stored weight, so it is no adapter's factor."""
    sizes = {"w": (3, 5), "a": (3, 2), "b": (2, 5)}
    model, x = Computes(PRODUCTS[spelled], sizes), torch.randn(4, 3)
    gm = trace(model, (x,), frontend=frontend)
    seen = check_pass(FoldLora(), gm, x, expected=model(x), control=x @ model.w)
    assert len(text(seen.gm).splitlines()) == 3
    (line,) = explain(gm)
    assert "3 -> 5 of x: becomes the layer of" in line


def test_a_sum_of_products_with_no_bias_is_a_linear_layer() -> None:
    """``addmm(x A B, x, W)``: what is called has to have a bias, and none is left."""
    sizes = {"a": (3, 2), "b": (2, 5), "w": (3, 5)}
    model, x = Computes(lambda m, x: torch.addmm(x @ m.a @ m.b, x, m.w), sizes), torch.randn(4, 3)
    gm = trace(model, (x,), frontend="export")
    seen = check_pass(FoldLora(), gm, x, expected=model(x), control=x @ model.w)
    assert seen.after == "x = input()\nlinear = linear(x, w)\nreturn [linear]"


@torch.no_grad()
def test_what_is_written_into_whole_numbers_is_cut() -> None:
    def cut(m: Any, x: torch.Tensor, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        y = x @ m.w
        return torch.zeros_like(y, dtype=dtype).copy_(y) * m.gain

    model, x = Computes(cut, {"w": (3, 5), "gain": (5,)}), 10 * torch.randn(4, 3)
    folded = FoldLora()(trace(model, (x,), frontend="export")).graph_module
    torch.testing.assert_close(folded(x), model(x))
    assert not torch.allclose(cut(model, x, x.dtype), model(x))


def test_a_product_with_the_sum_of_two_stored_matrices_may_be_an_adapters() -> None:
    model = Computes(lambda m, x: x @ (m.v + m.w), {"v": (3, 2), "w": (3, 2)})
    assert not FoldLora()(trace(model, (torch.randn(4, 3),))).edits


class Known(nn.Module):
    """Layers of what no input has a say in: places, a table of them, queries that are learned."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.norm = nn.Embedding(9, 3), nn.LayerNorm(3)
        self.first, self.second, self.q = nn.Linear(2, 4), nn.Linear(4, 3), nn.Linear(3, 5)
        self.fc = nn.Linear(3, 5)
        self.queries = nn.Parameter(torch.randn(1, 4, 3))
        self.register_buffer("ids", torch.arange(9)[None])
        self.register_buffer("table", torch.randn(4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = torch.sigmoid(self.second(torch.relu(self.first(self.table))))
        query = self.norm(self.queries)
        return self.fc(x + self.places(self.ids[:, :4]) + bias + query) * self.q(query)


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize(
    "path", ["places", "first", "second", "q", "fc", "first second", "places first second q fc"]
)
def test_a_layer_of_what_is_known_before_is_folded_like_others(path: str, frontend: str) -> None:
    torch.manual_seed(3)
    model, x = Known().eval(), torch.randn(2, 4, 3)
    base = trace(model, (x,), frontend=frontend)
    layers = {site.path: site.shape for site in sites(base) if site.path in path.split()}
    injected = inject(base, make_adapter(layers))
    seen = check_pass(FoldLora(), injected, x, expected=injected(x), control=model(x))
    assert seen.after == text(base)
    assert unmerged(seen.gm) == {}
    assert text(unfold(seen.gm)) == text(injected)
    again = check_pass(FoldLora(), seen.gm, x)
    assert again.result.edits == ()


def test_what_cannot_be_folded_of_what_is_known_stays_as_it_was() -> None:
    torch.manual_seed(3)
    table = nn.Parameter(torch.randn(1, 4, 6))
    model = Computes(
        lambda own, x: x + own.conv(own.table), conv=nn.Conv1d(4, 6, 1, groups=2), table=table
    ).eval()
    x = torch.randn(2, 6, 6)
    injected = inject(trace(model, (x,)), make_adapter({"conv": (6, 4, 1)}))
    seen = check_pass(FoldLora(), injected, x, expected=injected(x), control=model(x))
    assert seen.after == text(injected)
    assert list(unmerged(seen.gm)) == ["conv"]


class Affine(nn.Module):
    """Spellings that no pass knows by name."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(3, 5)
        self.a = nn.Parameter(torch.randn(5, 2))
        self.b = nn.Parameter(torch.randn(2, 3))
        self.gain = nn.Parameter(torch.randn(5))
        self.drop = nn.Dropout(0.3)


class Spelled(Affine):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = (self.drop(x) @ self.b.T).matmul(self.a.T)
        return self.drop(3.0 * low / 2 + self.base(x)) * self.gain - 1.5


class WeightForm(Affine):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.base.weight + 2 * self.a @ self.b
        return torch.nn.functional.linear(x, weight, self.base.bias)


class Negated(Affine):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1 - (torch.mm(x, self.b.T) @ self.a.T - self.base(x))


@pytest.mark.parametrize("model", [Spelled, WeightForm, Negated])
@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_any_affine_spelling_becomes_one_layer(model: Any, frontend: str) -> None:
    torch.manual_seed(0)
    module, x = model().eval(), torch.randn(4, 3)
    gm = trace(module, (x,), frontend=frontend)
    seen = check_pass(FoldLora(), gm, x, expected=module(x), control=module.base(x))
    assert seen.after.count("linear(") == 1
    assert "matmul" not in seen.after
    assert "base.weight" in seen.after or model is WeightForm


class Refused(Affine):
    """What only looks affine."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base, low = self.base(x), x @ self.b.T @ self.a.T
        if self.kind == "relu":
            return base + torch.relu(low)
        if self.kind == "product":
            return base * low
        if self.kind == "two sources":
            return base + torch.sin(x) @ self.b.T @ self.a.T
        if self.kind == "dropout":
            return base + nn.functional.dropout(x, 0.5, True) @ self.b.T @ self.a.T
        return base + x.sum(-1, keepdim=True) * low


@pytest.mark.parametrize("kind", ["relu", "product", "two sources", "dropout", "scaled by data"])
def test_what_is_not_affine_is_left_alone(kind: str) -> None:
    module, x = Refused(kind), torch.randn(4, 3)
    seen = check_pass(FoldLora(), trace(module, (x,), frontend="symbolic"), x)
    assert seen.after == seen.before


def test_a_layer_that_is_read_from_outside_stays_and_says_why() -> None:
    class Outside(Affine):
        def forward(self, x: torch.Tensor) -> Any:
            base = self.base(x)
            return base + x @ self.b.T @ self.a.T, torch.relu(base)

    gm = trace(Outside())
    seen = check_pass(FoldLora(), gm, torch.randn(4, 3))
    assert [str(e) for e in seen.result.edits] == [
        "skip base: linear is also read outside the region"
    ]
    assert not seen.result.modified


def test_a_tied_weight_is_cloned_on_write() -> None:
    case, gm = zoo("qwen2")
    update = Update(torch.randn(2, 24), torch.randn(97, 2), 1.0)
    folded = fold(inject(gm, Adapter("a", {"lm_head": update})))
    table = case.model.model.embed_tokens.weight
    values = dict(folded.named_parameters(remove_duplicate=False))
    same = [name for name, value in values.items() if value.shape == table.shape]
    assert len(same) == 2
    assert sum(torch.equal(values[name], table) for name in same) == 1


def test_accumulation_is_wide_and_rounds_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48, bias=False)).half()
    update = Update(torch.randn(8, 64), torch.randn(48, 8), 0.01)
    folded = fold(inject(trace(model), Adapter("a", {"0": update})))
    weight, down, up = model[0].weight.double(), update.down.half().double(), update.up.float()
    exact = weight + (0.01 * up).half().double() @ down
    assert torch.equal(attribute(folded, "0.weight"), exact.half())


def test_a_folded_weight_that_overflows_is_refused(ragged: Any) -> None:
    update = Update(torch.full((2, 3), 300.0), torch.full((5, 2), 300.0), 1.0)
    injected = inject(trace(ragged.half()), Adapter("a", {"wide": update}))
    folded = fold(injected)
    with pytest.raises(PassError, match=r"wide.weight.*float16.*180000.*wider"):
        attribute(folded, "wide.weight")


def test_large_values_whose_sum_overflows_are_folded(ragged: Any) -> None:
    update = Update(torch.full((2, 3), 150.0), torch.full((5, 2), 200.0), 1.0)
    folded = fold(inject(trace(ragged.half()), Adapter("a", {"wide": update})))
    weight = attribute(folded, "wide.weight")
    assert weight.isfinite().all()
    assert (weight > 59_000).all()


def test_a_weight_is_computed_when_it_is_read(ragged: Any, x: Any) -> None:
    injected = inject(trace(ragged, (x,)), make_adapter(SHAPES))
    folded = fold(injected)
    lazy = get_unevaluated(folded, "wide.weight")
    assert isinstance(lazy, LazyTensor)
    wanted = ragged.wide.weight + make_adapter(SHAPES).updates["wide"].delta()
    torch.testing.assert_close(attribute(folded, "wide.weight"), wanted)
    assert attribute(folded, "wide.weight") is attribute(folded, "wide.weight")


def test_a_constant_that_is_computed_survives_the_fold() -> None:
    class Gated(Affine):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) * torch.sigmoid(self.gain)

    module, x = Gated().requires_grad_(False), torch.randn(4, 3)
    for frontend in ("symbolic", "export"):
        gm = trace(module, (x,), frontend=frontend)
        check_pass(FoldLora(), gm, x, expected=module(x), control=module.base(x))


def test_a_weight_that_changes_before_it_is_read_is_refused(ragged: Any) -> None:
    folded = fold(inject(trace(ragged), make_adapter(SHAPES)))
    with torch.no_grad():
        ragged.wide.weight.mul_(2)
    with pytest.raises(PassError, match=r"wide.weight was changed in place.*fold again"):
        attribute(folded, "wide.weight")


def test_a_folded_weight_that_was_read_and_then_changed_is_refused(ragged: Any) -> None:
    first = fold(inject(trace(ragged), make_adapter(SHAPES)))
    second = fold(inject(first, make_adapter({"wide": (5, 3)}, name="german")))
    once = attribute(first, "wide.weight")
    with torch.no_grad():
        once.mul_(2)
    with pytest.raises(PassError, match=r"wide.weight was changed in place.*fold again"):
        attribute(second, "wide.weight")
    attribute(second, "again.weight")  # the control: nobody wrote to this one


def test_a_weight_written_in_place_is_never_folded() -> None:
    class Written(Affine):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.base(x)
            z = y + x @ self.b.T @ self.a.T
            y.add_(1)
            return y * z

    module, x = Written(), torch.randn(4, 3)
    gm = trace(module, (x,))
    assert torch.equal(fold(gm)(x), module(x))


class Beside(nn.Module):
    """A layer and a constant that may change the shape or the dtype of the result."""

    def __init__(self, shape: tuple[int, ...], product: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)
        self.constant = nn.Parameter(torch.randn(shape))
        self.product = product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        return y * self.constant if self.product else y + self.constant


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("product", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 5), (1, 1, 1), (1, 5), (5,), (1,), ()])
def test_a_constant_never_loses_its_axes(shape: Any, product: bool, frontend: str) -> None:
    module, x = Beside(shape, product), torch.randn(4, 3)
    folded = fold(trace(module, (x,), frontend=frontend))(x)
    torch.testing.assert_close(folded, module(x))


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("product", [True, False])
def test_a_constant_never_loses_its_dtype(product: bool, frontend: str) -> None:
    module, x = Beside((5,), product), torch.randn(4, 3).half()
    module.fc.half()
    folded = fold(trace(module, (x,), frontend=frontend))(x)
    assert folded.dtype == torch.float32
    assert torch.equal(folded, module(x))


def test_calls_by_keyword_and_narrowing_casts_are_no_trouble() -> None:
    class Keywords(Affine):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            low = torch.matmul(input=torch.matmul(input=x, other=self.b.T), other=self.a.T)
            return torch.neg(input=low) + torch.mul(input=self.base(x), other=2.0).mul(other=0.5)

    class Narrow(Affine):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            delta = self.a.to(torch.float16) @ self.b.half()
            return nn.functional.linear(x, self.base.weight + 2 * delta.float(), self.base.bias)

    x = torch.randn(4, 3)
    check_pass(FoldLora(), trace(Keywords()), x)
    narrow = Narrow()
    seen = check_pass(FoldLora(), trace(narrow), x, dtype=torch.float16)  # rounds in between
    assert "matmul" not in seen.after
    assert (seen.gm(x) - narrow(x)).norm() <= 2e-3 * narrow(x).norm()


def test_chance_is_never_a_constant() -> None:
    class Noisy(Affine):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            noisy = nn.functional.alpha_dropout(self.base.weight, 0.5, True)
            return nn.functional.linear(x, noisy)

    for frontend in ("symbolic", "export"):
        gm = trace(Noisy(), (torch.randn(4, 3),), frontend=frontend)
        assert not FoldLora()(gm).modified


def test_what_is_being_trained_is_folded_as_it_is_now(ragged: Any, x: Any) -> None:
    config = LoraConfig(r=2, target_modules=["wide", "again"], init="orthogonal", seed=0)
    injected = inject(trace(ragged, (x,)), config)
    with torch.no_grad():
        before, folded = injected(x), fold(injected)
        for parameter in (p for p in injected.parameters() if p.requires_grad):
            parameter.add_(0.1)  # another step of training
        torch.testing.assert_close(folded(x), before)
        assert not torch.allclose(injected(x), before, rtol=1e-2)


class Turned(nn.Module):
    """A layer that stores its weight as (in, out), and a linear call that turns it around."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(nn.functional.linear(x, self.weight.t(), self.bias))


PLAIN = """\
input = input()
linear = linear(input, 0.weight, 0.bias)
tanh = tanh(linear)
return tanh"""


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_a_layer_that_turns_its_own_weight_is_folded_to_a_plain_one(frontend: str, x: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Turned()).eval()
    injected = inject(trace(model, (x,), frontend=frontend), make_adapter({"0": (5, 3)}))
    seen = check_pass(FoldLora(), injected, x, expected=injected(x), control=model(x))
    assert seen.after.replace("[tanh]", "tanh") == PLAIN
    assert attribute(seen.gm, "0.weight").shape == (5, 3)


LAYERS = {
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2), (6, 4, 3, 3)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=3, bias=False), (6, 4, 3)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (6, 4, 3)),
    "embedding": (lambda: nn.Embedding(9, 6, padding_idx=2, scale_grad_by_freq=True), (9, 6)),
}


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_folded_layer_keeps_its_other_arguments(name: str, frontend: str) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    model, sizes = nn.Sequential(make(), nn.Tanh()).eval(), [11] * (len(shape) - 2)
    x = torch.randint(0, 9, (3, 5)) if name == "embedding" else torch.randn(2, 4, *sizes)
    base = trace(model, (x,), frontend=frontend)
    (site,) = sites(base)
    injected = inject(base, make_adapter({site.path: site.shape}))
    seen = check_pass(FoldLora(), injected, x, expected=injected(x), control=model(x))
    assert seen.after == text(base)
