"""Weighted sums of adapters, against the weight form in float64 and PEFT's own."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoHaConfig, LoKrConfig, PeftModel, get_peft_model
from peft import LoraConfig as PeftConfig

from lora_fx import (
    Adapter,
    AdapterError,
    Update,
    combine,
    fold,
    inject,
    load_adapter,
    save_adapter,
    trace,
)
from lora_fx.adapters.target_rule import TargetRule
from lora_fx.testing import make_adapter, relative

WAYS = ["cat", "linear", "svd"]


def update(
    shape: tuple[int, int] = (5, 3),
    rank: int = 2,
    alpha: float = 3.0,
    seed: int = 0,
    **fields: Any,
) -> Update:
    make = torch.Generator().manual_seed(seed)
    kind, dtype = fields.pop("kind", "lora"), fields.pop("dtype", torch.float64)
    scale = alpha / (math.sqrt(rank) if kind == "rslora" else rank)
    down = torch.randn(rank, shape[1], generator=make, dtype=torch.float64).to(dtype)
    up = torch.randn(shape[0], rank, generator=make, dtype=torch.float64).to(dtype)
    return Update(down, up, scale, kind, **fields)


def adapter(name: str = "a", path: str = "fc", **fields: Any) -> Adapter:
    return Adapter(name, {path: update(**fields)})


def exact(terms: list[tuple[Update, float]]) -> torch.Tensor:
    """The weight form: the definition, in float64."""
    return sum((w * u.scale * (u.up.double() @ u.down.double()) for u, w in terms), torch.zeros(()))


def blended(terms: list[tuple[Update, float]]) -> torch.Tensor:
    """PEFT's linear combination by its definition, with each update's true scale."""
    factors = [w * u.scale for u, w in terms]
    downs = [math.sqrt(abs(f)) * u.down.double() for f, (u, _) in zip(factors, terms, strict=True)]
    ups = [math.sqrt(abs(f)) * u.up.double() for f, (u, _) in zip(factors, terms, strict=True)]
    signed = [d if f >= 0 else -d for f, d in zip(factors, downs, strict=True)]
    return sum(ups, torch.zeros(())) @ sum(signed, torch.zeros(()))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def cut(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    rows, values, columns = torch.linalg.svd(matrix, full_matrices=False)
    return rows[:, :rank] @ torch.diag(values[:rank]) @ columns[:rank]


@st.composite
def weighted(draw: Any, equal_ranks: bool = False) -> list[tuple[Update, float]]:
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    common = draw(st.integers(1, 6))
    amounts = st.floats(0.1, 3.0) | st.floats(-3.0, -0.1)
    return [
        (
            update(
                shape,
                rank=common if equal_ranks else draw(st.integers(1, 6)),
                alpha=draw(st.floats(0.5, 32.0)),
                seed=seed,
                kind=draw(st.sampled_from(["lora", "rslora"])),
                bias=draw(st.none() | st.just(torch.ones(shape[0], dtype=torch.float64))),
            ),
            draw(amounts),
        )
        for seed in range(draw(st.integers(1, 4)))
    ]


def as_adapters(terms: list[tuple[Update, float]]) -> list[tuple[Adapter, float]]:
    return [(Adapter(f"a{i}", {"fc": u}), w) for i, (u, w) in enumerate(terms)]


@settings(deadline=None, max_examples=150)
@given(weighted())
def test_cat_is_the_exact_sum_at_the_sum_of_the_ranks(terms: list[tuple[Update, float]]) -> None:
    result = combine(as_adapters(terms)).updates["fc"]
    size = sum(abs(w * u.scale) * (u.up.norm() * u.down.norm()) for u, w in terms)
    assert result.rank == sum(u.rank for u, _ in terms)
    assert (result.delta() - exact(terms)).norm() <= 1e-14 * size
    off = [(terms[0][0], 0.9 * terms[0][1]), *terms[1:]]
    assert (result.delta() - exact(off)).norm() > 1e-5 * exact(terms[:1]).norm()
    biases = [w * u.scale * u.bias for u, w in terms if u.bias is not None]
    assert (result.bias is None) == (not biases)
    if biases and result.bias is not None:
        assert (result.bias - sum(biases)).abs().max() <= 1e-12


@settings(deadline=None, max_examples=100)
@given(weighted(), st.integers(1, 8))
def test_svd_is_the_nearest_of_its_rank(terms: list[tuple[Update, float]], rank: int) -> None:
    result = combine(as_adapters(terms), how="svd", rank=rank).updates["fc"]
    best = (exact(terms) - cut(exact(terms), rank)).norm()
    size = sum(abs(w * u.scale) * (u.up.norm() * u.down.norm()) for u, w in terms)
    assert result.rank <= rank
    assert (result.delta() - exact(terms)).norm() <= best + 1e-13 * size


@settings(deadline=None, max_examples=100)
@given(weighted(equal_ranks=True))
def test_linear_is_peft_s_definition_with_true_scales(terms: list[tuple[Update, float]]) -> None:
    result = combine(as_adapters(terms), how="linear").updates["fc"]
    assert result.rank == terms[0][0].rank
    size = sum(math.sqrt(abs(w * u.scale)) * u.up.norm() for u, w in terms) * sum(
        math.sqrt(abs(w * u.scale)) * u.down.norm() for u, w in terms
    )
    assert (result.delta() - blended(terms)).norm() <= 1e-14 * size


def test_linear_is_not_the_sum_which_is_the_point_of_the_others() -> None:
    terms = [(update(seed=1), 0.7), (update(seed=2), -0.3)]
    assert distance(combine(as_adapters(terms), "linear").updates["fc"].delta(), exact(terms)) > 0.1
    assert distance(combine(as_adapters(terms), "cat").updates["fc"].delta(), exact(terms)) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", WAYS)
def test_half_precision_files_are_summed_in_float32(how: str, dtype: torch.dtype) -> None:
    shape, rank = (40, 30), 4
    terms = [(update(shape, rank, seed=s, dtype=dtype), w) for s, w in ((1, 0.7), (2, -1.3))]
    result = combine(as_adapters(terms), how, **({"rank": 8} if how == "svd" else {}))
    found = result.updates["fc"]
    assert (found.up.dtype, found.down.dtype) == (torch.float32, torch.float32)
    expected = blended(terms) if how == "linear" else exact(terms)
    assert distance(found.delta(), expected) <= 1e-6
    rounded = found.up.to(dtype).double() @ found.down.to(dtype).double()
    assert distance(rounded, expected) > 1e-5


def test_svd_takes_the_highest_of_the_layer_s_ranks() -> None:
    small = Adapter("a", {"fc": update((9, 8), 2), "alone": update((9, 8), 2)})
    large = Adapter("b", {"fc": update((9, 8), 5, seed=1)})
    result = combine([(small, 1.0), (large, 1.0)], how="svd")
    assert {path: u.rank for path, u in result.updates.items()} == {"fc": 5, "alone": 2}
    assert combine([(small, 1.0), (large, 1.0)], "svd", rank=7).updates["fc"].rank == 7


def test_a_layer_of_one_adapter_gets_that_adapter_s_part() -> None:
    french, latin = adapter("french"), adapter("latin", "other", seed=1)
    result = combine([(french, 0.7), (latin, -0.3)])
    assert result.name == "french_latin"
    assert str(result).splitlines() == [
        "adapter french_latin: 2 targets",
        "  fc  lora  3 -> 5  rank 2  scale 1",
        "  other  lora  3 -> 5  rank 2  scale 1",
    ]
    for path, one, weight in (("fc", french, 0.7), ("other", latin, -0.3)):
        expected = weight * one.updates[path].delta()
        assert distance(result.updates[path].delta(), expected) <= 1e-15
        assert distance(result.updates[path].delta(), 0.9 * expected) > 1e-2


@pytest.mark.parametrize("how", WAYS)
def test_the_sum_runs_as_both_adapters_run(how: str, ragged: Any, x: torch.Tensor) -> None:
    shapes = {"wide": (5, 3), "again": (5, 5)}
    french, latin = make_adapter(shapes), make_adapter({"wide": (5, 3), "narrow": (7, 5)}, 3)
    latin = Adapter("latin", latin.updates, {"wide.bias": torch.arange(5.0)})
    gm = trace(ragged)
    if how == "linear":
        latin = Adapter("latin", {"narrow": latin.updates["narrow"]}, latin.replacements)
    options = {"rank": 5} if how == "svd" else {}
    summed = inject(gm, combine([(french, 1.0), (latin, 1)], how, **options, name="sum"))
    with torch.no_grad():
        wanted = inject(gm, [french, latin])(x)
        assert relative(summed(x), wanted) <= 1e-6
        assert relative(fold(summed)(x), wanted) <= 1e-5
        assert relative(inject(gm, combine([(french, 1.0), (latin, 0.9)]))(x), wanted) > 1e-3


def test_the_inputs_stay_as_they_were() -> None:
    french, latin = adapter("french"), adapter("latin", seed=1)
    before = [
        t.clone() for a in (french, latin) for t in (a.updates["fc"].up, a.updates["fc"].down)
    ]
    for how in WAYS:
        combine([(french, 0.7), (latin, -0.3)], how)
    after = [t for a in (french, latin) for t in (a.updates["fc"].up, a.updates["fc"].down)]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


def test_replacements_are_taken_whole_and_must_agree() -> None:
    head, bias = torch.arange(6.0), torch.ones(5)
    french = Adapter("french", {"fc": update()}, {"head.weight": head})
    same = Adapter("same", {"fc": update()}, {"head.weight": head.half(), "fc.bias": bias})
    other = Adapter("other", {"fc": update()}, {"head.weight": head + 1})
    longer = Adapter("longer", {"fc": update()}, {"head.weight": torch.ones(7)})
    result = combine([(french, 0.7), (same, 0.3)])
    assert set(result.replacements) == {"head.weight", "fc.bias"}
    assert torch.equal(result.replacements["head.weight"], head)
    for wrong in (other, longer):
        with pytest.raises(AdapterError, match=rf"head\.weight: adapters french and {wrong.name}"):
            combine([(french, 0.7), (wrong, 0.3)])


def test_the_rule_of_targets_stays_if_it_is_one() -> None:
    one, other = TargetRule(["fc"]), TargetRule(["fc", "other"])
    a, b, c = (Adapter("a", {"fc": update()}, expects=rule) for rule in (one, one, other))
    assert combine([(a, 1.0), (b, 1.0)]).expects == one
    assert combine([(a, 1.0), (c, 1.0)]).expects is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "nothing to combine"),
        ((None,), "nothing to combine"),
        (([adapter()],), "expected an Adapter and a finite weight"),
        (([(adapter(), "0.7")],), "expected an Adapter and a finite weight"),
        (([(adapter(), True)],), "expected an Adapter and a finite weight"),
        (([(adapter(), math.nan)],), "finite weight"),
        (([(adapter(), -math.inf)],), "finite weight"),
        (([(adapter(), 10**400)],), "finite weight"),
        (([(update(), 1.0)],), "expected an Adapter"),
        (([(adapter(), 1.0)], "ties"), "how is 'ties', expected one of cat, linear, svd"),
        (([(adapter(), 1.0)], "cat", 4), "rank=4 is for how='svd'"),
        (([(adapter(), 1.0)], "svd", 0), "rank is 0, expected a positive integer"),
        (([(adapter(), 1.0)], "cat", None, "a.b"), "letters, digits and underscores"),
        (([(adapter(), 1.0), (adapter("b", shape=(5, 4)), 1.0)],), "layer 3 -> 5, adapter b for"),
        (([(adapter(), 1.0), (adapter("b", rank=3), 1.0)], "linear"), r"found \[2, 3\]"),
    ],
)  # fmt: skip
def test_what_cannot_be_combined_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        combine(*arguments)


@pytest.mark.parametrize("how", WAYS)
def test_a_sum_that_is_not_finite_is_refused(how: str) -> None:
    single = update(dtype=torch.float32)
    broken = Update(single.down, torch.full((5, 2), math.nan), 1.0)
    for u, weight in ((single, 1e300), (broken, 1.0)):
        with pytest.raises(AdapterError, match=r"fc: the sum is not finite in torch\.float32"):
            combine([(Adapter("a", {"fc": u}), weight)], how)


def peft_with_two(tmp_path: Path, rslora: bool, ranks: tuple[int, int], **fields: Any) -> PeftModel:
    """A PEFT model with adapters french (wide, narrow) and latin (wide), random, and saved."""
    torch.manual_seed(0)
    base = torch.nn.ModuleDict({"wide": torch.nn.Linear(6, 9), "narrow": torch.nn.Linear(9, 7)})
    fields |= {"use_rslora": rslora}
    configs = {
        "french": PeftConfig(r=ranks[0], lora_alpha=6, target_modules=["wide", "narrow"], **fields),
        "latin": PeftConfig(r=ranks[1], lora_alpha=3, target_modules=["wide"], **fields),
    }
    model = get_peft_model(base, configs["french"], adapter_name="french")
    model.add_adapter("latin", configs["latin"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.5)
    with warnings.catch_warnings():
        # PEFT takes lora_bias for a broken shard.
        warnings.filterwarnings("ignore", ".*LoRA tensor.s. have invalid shape.*lora_B.bias")
        model.save_pretrained(tmp_path)
    return model


def both(tmp_path: Path) -> list[tuple[Adapter, float]]:
    return [(load_adapter(tmp_path / "french"), 0.7), (load_adapter(tmp_path / "latin"), -0.3)]


def deltas(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    layers = model.base_model.model
    return {path: layers[path].get_delta_weight(name).detach() for path in ("wide", "narrow")}


@pytest.mark.parametrize(("how", "ranks"), [("cat", (2, 4)), ("linear", (3, 3)), ("svd", (2, 4))])
def test_plain_lora_is_combined_as_peft_does(
    how: str, ranks: tuple[int, int], tmp_path: Path
) -> None:
    model = peft_with_two(tmp_path, False, ranks)
    model.add_weighted_adapter(["french", "latin"], [0.7, -0.3], "both", combination_type=how)
    result = combine(both(tmp_path), how)
    for path, wanted in deltas(model, "both").items():
        assert distance(result.updates[path].delta(), wanted) <= 2e-6
        assert distance(0.9 * result.updates[path].delta(), wanted) > 5e-2


@pytest.mark.parametrize(
    ("how", "ranks", "rank"), [("cat", (2, 4), 6), ("linear", (3, 3), 3), ("svd", (2, 4), 4)]
)
def test_rslora_is_combined_right_where_peft_is_off_by_the_root_of_the_rank(
    how: str, ranks: tuple[int, int], rank: int, tmp_path: Path
) -> None:
    model = peft_with_two(tmp_path, True, ranks)
    model.add_weighted_adapter(["french", "latin"], [0.7, -0.3], "both", combination_type=how)
    pairs = both(tmp_path)
    result = combine(pairs, how)
    terms = [(a.updates["wide"], w) for a, w in pairs]
    right = blended(terms) if how == "linear" else cut(exact(terms), rank)
    peft = deltas(model, "both")["wide"]
    assert distance(result.updates["wide"].delta(), right) <= 2e-6
    assert distance(peft, right) > 0.5
    assert distance(peft / math.sqrt(rank), right) <= 2e-6


def test_a_lora_bias_is_summed_where_peft_drops_it(tmp_path: Path) -> None:
    model = peft_with_two(tmp_path, False, (2, 4), lora_bias=True)
    model.add_weighted_adapter(["french", "latin"], [0.7, -0.3], "both", combination_type="cat")
    assert not model.base_model.model["wide"].lora_B["both"].bias.any()
    pairs = both(tmp_path)
    x = torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(1))
    layer = model.base_model.model["wide"]
    wanted = torch.zeros(4, 7, 9)
    for name, weight in (("french", 0.7), ("latin", -0.3)):
        part = layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name]
        wanted = wanted + weight * part.detach()
    result = combine(pairs).updates["wide"]
    assert result.bias is not None
    assert distance(x @ result.delta().T + result.bias, wanted) <= 1e-6
    assert distance(x @ result.delta().T, wanted) > 1e-2


@pytest.mark.parametrize("how", WAYS)
def test_the_result_is_saved_as_peft_and_read_back_bit_for_bit(how: str, tmp_path: Path) -> None:
    peft_with_two(tmp_path / "two", True, (3, 3))
    result = combine(both(tmp_path / "two"), how, name="sum")
    save_adapter(result, tmp_path / "sum")
    again = load_adapter(tmp_path / "sum")
    assert str(again) == str(result)
    for path, found in again.updates.items():
        assert torch.equal(found.up, result.updates[path].up)
        assert torch.equal(found.down, result.updates[path].down)


def every_layer() -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    layers = {"fc": torch.nn.Linear(6, 9), "table": torch.nn.Embedding(7, 4)}
    return torch.nn.ModuleDict(layers | {"conv": torch.nn.Conv2d(3, 5, (2, 4))})


def saved_by_peft(path: Path, config: Any, seed: int) -> dict[str, torch.Tensor]:
    """An adapter of PEFT's, randomised and saved; what it adds, by layer as (out, in, *kernel)."""
    model = get_peft_model(every_layer(), config)
    make = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=make))
    model.save_pretrained(path)
    return added_by(model)


def added_by(model: PeftModel) -> dict[str, torch.Tensor]:
    names = [name for name, m in model.base_model.model.items() if hasattr(m, "get_delta_weight")]
    found = {n: model.base_model.model[n].get_delta_weight("default").detach() for n in names}
    return {name: delta.T if name == "table" else delta for name, delta in found.items()}


def test_tables_and_kernels_go_to_peft_as_one_adapter(tmp_path: Path) -> None:
    targets = ["fc", "table", "conv"]
    configs = [PeftConfig(r=r, lora_alpha=3, target_modules=targets) for r in (2, 3)]
    one, two = (saved_by_peft(tmp_path / str(i), c, i) for i, c in enumerate(configs))
    result = combine([(load_adapter(tmp_path / "0"), 0.7), (load_adapter(tmp_path / "1"), -0.3)])
    save_adapter(result, tmp_path / "both")
    found = added_by(PeftModel.from_pretrained(every_layer(), tmp_path / "both"))
    assert found.keys() == one.keys() == set(targets)
    for name, delta in found.items():
        assert distance(delta, 0.7 * one[name] - 0.3 * two[name]) <= 1e-6
        assert distance(delta, 0.7 * one[name] - 0.27 * two[name]) > 1e-2


def test_loha_and_lora_are_summed(tmp_path: Path) -> None:
    lora = PeftConfig(r=2, lora_alpha=3, target_modules=["fc", "conv"])
    loha = LoHaConfig(r=2, alpha=3, target_modules=["fc", "conv"])
    one, two = (saved_by_peft(tmp_path / str(i), c, i) for i, c in enumerate((lora, loha)))
    adapters = [load_adapter(tmp_path / name, name=f"a{name}") for name in "01"]
    result = combine([(adapters[0], 0.7), (adapters[1], -0.3)])
    for name, update in result.updates.items():
        wanted = 0.7 * one[name] - 0.3 * two[name]
        assert update.kind == "lora"
        assert distance(update.delta().reshape(wanted.shape), wanted) <= 1e-6
        assert distance(update.delta().reshape(wanted.shape), 0.7 * one[name]) > 1e-2


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (PeftConfig(r=2, target_modules=["fc"], use_dora=True), "dora"),
        (IA3Config(target_modules=["fc"], feedforward_modules=[], init_ia3_weights=False), "ia3"),
        (LoKrConfig(r=2, alpha=3, target_modules=["fc"]), "lokr"),
    ],
)
@pytest.mark.parametrize("how", WAYS)
def test_kinds_that_are_no_product_are_refused_by_name(
    how: str, config: Any, kind: str, tmp_path: Path
) -> None:
    get_peft_model(every_layer(), config).save_pretrained(tmp_path / "other")
    other = load_adapter(tmp_path / "other")
    with pytest.raises(AdapterError, match=f"adapter other, fc: an update of kind '{kind}'"):
        combine([(adapter(shape=(9, 6)), 0.7), (other, 0.3)], how)
