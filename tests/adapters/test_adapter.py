"""An adapter as a value: its algebra, its closed mappings, its text."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_fx import AdapterError
from lora_fx.adapters.adapter import Adapter, Update
from lora_fx.adapters.lora_config import LoraConfig
from lora_fx.adapters.other_updates import WeightUpdate
from lora_fx.algebra.evaluate import dense
from lora_fx.algebra.matrix_expr import Leaf
from lora_fx.testing.updates import UPDATES, update_of

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def update(rank: int = 2, dtype: torch.dtype = torch.float32, **fields: Any) -> Update:
    generator = torch.Generator().manual_seed(rank)
    down = torch.randn(rank, 3, generator=generator).to(dtype)
    up = torch.randn(5, rank, generator=generator).to(dtype)
    return Update(**{"down": down, "up": up, "scale": 1.5, **fields})


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("scale", ["2", None, 2j, 10**400, torch.ones(2)])
def test_a_scale_is_a_number_of_float64(scale: Any) -> None:
    with pytest.raises(AdapterError, match=r"^Update\.scale is .*: expected float$"):
        update(scale=scale)
    for one in (2, torch.tensor(2.0), np.float32(2)):
        assert repr(update(scale=one).scale) == "2.0"
    assert update(scale=10**30).scale == 1e30


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_delta_is_the_scaled_product_in_float32_or_wider(dtype: torch.dtype) -> None:
    u = update(dtype=dtype)
    expected = 1.5 * (u.up.double() @ u.down.double())
    delta = u.delta()
    assert delta.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(delta, expected) <= 1e-6
    assert relative_error(0.9 * delta, expected) > 1e-2


def test_factors_of_two_dtypes_multiply() -> None:
    u = update()
    mixed = Update(u.down.double(), u.up.half(), 1.5)
    assert mixed.delta().dtype == torch.float64


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_factors_make_the_delta_and_are_rounded_once(
    dtype: torch.dtype, target: torch.dtype
) -> None:
    u = update(dtype=dtype, scale=1.7, bias=torch.randn(5).to(dtype))
    down, up, bias = u.factors(target)
    assert u.bias is not None
    assert bias is not None
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(down, u.down.to(target))
    assert torch.equal(up, (1.7 * u.up.to(torch.promote_types(wide, target))).to(target))
    assert torch.equal(bias, (1.7 * u.bias.to(wide)).to(target))
    product = up.double() @ down.double()
    rounding = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float64: 1e-15}
    exact = 1.7 * u.up.double() @ u.down.double()
    assert relative_error(product, exact) <= rounding.get(target, 1e-6)
    assert relative_error(0.9 * product, u.delta()) > 5e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_scale_applied_in_half_precision_would_show(dtype: torch.dtype) -> None:
    u = update(rank=64, dtype=dtype, scale=1.7)
    _, up, bias = u.factors(torch.float32)
    expected = 1.7 * u.up.double()
    assert bias is None
    assert relative_error(up, expected) <= 1e-6
    assert relative_error(1.7 * u.up, expected) > 1e-5


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"bias": torch.ones(5)}, True),
        ({"scale": float("inf")}, False),
        ({"up": torch.full((5, 2), float("nan"))}, False),
        ({"down": torch.full((2, 3), float("inf"))}, False),
        ({"bias": torch.full((5,), float("nan"))}, False),
    ],
)
def test_whether_an_update_is_finite(fields: dict[str, Any], expected: bool) -> None:
    assert update(**fields).is_finite() is expected


def test_shape_rank_and_alpha() -> None:
    u = update(rank=4, scale=2.0)
    assert (u.shape, u.rank, u.alpha) == ((5, 3), 4, 8.0)
    assert update(rank=4, scale=2.0, kind="rslora").alpha == 4.0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, True),
        ({"scale": 0.0}, False),
        ({"up": torch.zeros(5, 2)}, False),
        ({"down": torch.zeros(2, 3)}, False),
        ({"up": torch.zeros(5, 2), "bias": torch.ones(5)}, True),
        ({"up": torch.zeros(5, 2), "bias": torch.zeros(5)}, False),
        ({"bias": torch.ones(5), "scale": 0.0}, False),
    ],
)
def test_whether_an_update_has_an_effect(fields: dict[str, Any], expected: bool) -> None:
    assert update(**fields).has_effect() is expected


def test_an_adapter_cannot_be_changed() -> None:
    updates = {"fc": update()}
    adapter = Adapter("a", updates)
    updates["q"] = update()
    assert set(adapter.updates) == {"fc"}
    with pytest.raises(TypeError):
        adapter.updates["q"] = update()  # type: ignore[index]
    with pytest.raises(AttributeError):
        adapter.name = "b"  # type: ignore[misc]


def test_the_text_is_one_line_a_target() -> None:
    adapter = Adapter("fr", {"b.fc": update(kind="rslora")}, {"head.bias": torch.ones(2)})
    assert str(adapter) == repr(adapter)
    assert str(adapter).splitlines() == [
        "adapter fr: 1 targets",
        "  b.fc  rslora  3 -> 5  rank 2  scale 1.5",
        "  head.bias  replaced  (2,)",
    ]


@pytest.mark.parametrize(
    ("down", "up"), [((2, 3), (5, 4)), ((3,), (5, 2)), ((2, 3), (5, 2, 1)), ((3, 3, 2), (5, 2))]
)
def test_factors_that_do_not_belong_together_are_refused(down: Any, up: Any) -> None:
    with pytest.raises(AdapterError, match=r"expected down \(r, in\) and up \(out, r\)"):
        Update(torch.ones(down), torch.ones(up), 1.0)


@pytest.mark.parametrize(
    ("name", "size", "axis"),
    [("bias", 1, "out"), ("magnitude", 3, "out"), ("row", 3, "out"), ("col", 5, "in")],
)
def test_a_vector_of_another_size_is_refused(name: str, size: int, axis: str) -> None:
    with pytest.raises(AdapterError, match=rf"{name} \({size},\): expected {name} \({axis},\)"):
        update(**{name: torch.ones(size)})


@pytest.mark.parametrize("name", ["a.b", "", "2nd"])
def test_a_name_that_could_be_no_parameters_is_refused(name: str) -> None:
    with pytest.raises(AdapterError, match="letters, digits and underscores"):
        Adapter(name, {})


@st.composite
def any_update(draw: Any) -> Update:
    out, into, rank = (draw(st.integers(1, 9)) for _ in range(3))
    make = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    down, up = (
        torch.randn(*shape, generator=make, dtype=torch.float64)
        for shape in ((rank, into), (out, rank))
    )
    kind = draw(st.sampled_from(["lora", "rslora"]))
    return Update(down, up, draw(st.floats(0.1, 4.0)), kind, bias=torch.ones(out))


@settings(deadline=None, max_examples=150)
@given(any_update(), st.integers(1, 9))
def test_a_lower_rank_is_the_nearest_there_is(u: Update, rank: int) -> None:
    found, error = u.to_rank(rank)
    assert found.rank <= min(rank, u.rank)
    assert (found.scale, found.kind, found.bias) == (u.scale, u.kind, u.bias)
    values = torch.linalg.svdvals(u.delta())
    assert error == pytest.approx(float(values[rank:].norm() / values.norm()), abs=1e-12)
    assert relative_error(found.delta(), u.delta()) == pytest.approx(error, abs=1e-12)
    assert (found is u) == (rank >= u.rank)
    if error > 1e-3:
        assert relative_error(0.9 * found.delta(), u.delta()) > error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_new_factors_are_float32_or_wider_and_balanced(dtype: torch.dtype) -> None:
    make = torch.Generator().manual_seed(0)
    down, up = torch.randn(6, 30, generator=make), 1e4 * torch.randn(50, 6, generator=make)
    u = Update(down.to(dtype), up.to(dtype), 1.5)
    found, error = u.to_rank(4)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (found.up.dtype, found.down.dtype) == (wide, wide)
    assert found.up.norm() == pytest.approx(float(found.down.norm()), rel=1e-5)
    assert relative_error(found.delta(), u.delta()) == pytest.approx(error, rel=1e-5)
    assert 0.05 < error < 0.9


def test_no_matrix_of_the_layer_s_size_is_made() -> None:
    # One of (out, in) would take 480 GB.
    u = Update(torch.randn(3, 200_000), torch.randn(300_000, 3), 1.0)
    found, error = u.to_rank(2)
    assert found.shape == (300_000, 200_000)
    assert 0 < error < 1


def test_a_lower_rank_of_an_update_without_effect() -> None:
    found, error = update(rank=4, up=torch.zeros(5, 4)).to_rank(2)
    assert (found.rank, error, found.has_effect()) == (2, 0.0, False)


def test_an_adapter_of_lower_rank_and_what_it_cost() -> None:
    head = torch.ones(2)
    adapter = Adapter("fr", {"a": update(rank=3), "b": update(rank=2)}, {"head.bias": head})
    reduced, errors = adapter.to_rank(2)
    assert (reduced.name, {p: u.rank for p, u in reduced.updates.items()}) == (
        "fr",
        {"a": 2, "b": 2},
    )
    assert reduced.updates["b"] is adapter.updates["b"]
    assert reduced.replacements["head.bias"] is head
    assert errors["b"] == 0.0
    distance = relative_error(reduced.updates["a"].delta(), adapter.updates["a"].delta())
    assert errors["a"] == pytest.approx(distance, rel=1e-5)
    assert errors["a"] > 1e-2
    assert adapter.to_rank(3).adapter.updates["a"] is adapter.updates["a"]
    assert [u.rank for u in adapter.updates.values()] == [3, 2]


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, None, "2"])
def test_a_rank_that_is_none_is_refused(rank: Any) -> None:
    with pytest.raises(AdapterError, match="expected a positive integer"):
        Adapter("fr", {"a": update()}).to_rank(rank)


def test_an_update_that_is_not_finite_has_no_rank() -> None:
    broken = update(rank=4, up=torch.full((5, 4), float("nan")))
    with pytest.raises(AdapterError, match="adapter fr: NaN or infinity in q"):
        Adapter("fr", {"a": update(), "q": broken}).to_rank(2)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"magnitude": torch.ones(5)}, "DoRA"),
        ({"down": torch.ones(4, 3, 1), "up": torch.ones(6, 2)}, "a grouped convolution"),
    ],
)
def test_a_product_of_which_rows_are_scaled_or_apart_has_no_lower_rank(
    fields: dict[str, Any], kind: str
) -> None:
    with pytest.raises(AdapterError, match=f"the rank of {kind} cannot be cut"):
        update(**fields).to_rank(1)


def test_a_notebook_sees_the_targets_as_a_table() -> None:
    head = {"head.weight": torch.ones(4, 3)}
    adapter = Adapter("fr", {"a": update()}, head, moved={"old": "new"})
    caption, _, first, second = ElementTree.fromstring(adapter._repr_html_())
    assert caption.text == "adapter fr: 1 targets; paths moved: old -> new"
    line = str(adapter).splitlines()[1].split("  ")
    cells = [cell.text for cell in first]
    assert cells[:3] == line[1:4]
    assert [f"rank {cells[3]}", f"scale {cells[4]}"] == line[4:]
    assert [cell.text for cell in second] == ["head.weight", "replaced", "(4, 3)", None, None]


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, pickled])
@pytest.mark.parametrize("kind", UPDATES)
def test_an_adapter_can_be_copied_and_pickled(kind: str, again: Callable[[Any], Any]) -> None:
    one = Adapter("fr", {"a": update_of(kind, (6, 8))}, {"b": torch.ones(2)}, moved={"x": "y"})
    if again is pickled and isinstance(one.updates["a"], WeightUpdate):
        with pytest.raises(AdapterError, match=r"function, which cannot be pickled: save"):
            again(one)
        return
    other = again(one)
    assert (other.name, dict(other.moved), str(other)) == ("fr", {"x": "y"}, str(one))
    assert torch.equal(other.replacements["b"], torch.ones(2))
    values = torch.randn(6, 8)
    weight = Leaf((6, 8), "w", lambda: values)
    mine, copied = (dense(each.updates["a"].of(weight), torch.float32) for each in (one, other))
    assert torch.equal(mine, copied)
    assert kind == "lora_bias" or not torch.equal(copied, values)
    with pytest.raises(TypeError):
        other.updates["b"] = one.updates["a"]


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, pickled])
def test_a_config_can_be_copied_and_pickled(again: Callable[[Any], Any]) -> None:
    config = LoraConfig(r=3, lora_alpha=6, rank_pattern={"a": 2}, name="fr")
    assert again(config) == config
    assert again(config) != LoraConfig(r=3, lora_alpha=6, name="fr")


def test_tensors_without_data_are_refused() -> None:
    whole = update()
    hollow = replace(whole, up=whole.up.to("meta"))
    for found in ({"updates": {"fc": hollow}}, {"updates": {}, "replacements": {"b": hollow.up}}):
        with pytest.raises(AdapterError, match="adapter a is made of tensors without data"):
            Adapter("a", **found)
    assert Adapter("a", {"fc": whole}).updates["fc"] is whole
