"""The sum of the updates of one layer, of every kind that is a product of two factors."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from lora_fx import Adapter, AdapterError, Update, combine
from lora_fx.adapters.adapter import AnyUpdate, Scaling, WeightUpdate
from lora_fx.adapters.merging import summed, term_of
from lora_fx.adapters.source_record import SourceRecord
from lora_fx.algebra.matrix_expr import Matrix

WAYS = ["cat", "linear", "svd"]
SHAPES = [(5, 3), (5, 3, 2), (5, 3, 2, 4), (5, 3, 1, 2, 3)]
EMBEDDING = SourceRecord({}, {"layer": "embedding"})


def update(shape: tuple[int, ...] = (5, 3), seed: int = 0, **fields: Any) -> Update:
    make = torch.Generator().manual_seed(seed)
    down = torch.randn(2, *shape[1:], generator=make)
    return Update(down, torch.randn(shape[0], 2, generator=make), 1.5, **fields)


def sum_of(updates: list[Update], how: str = "cat", rank: int | None = None) -> Update:
    terms = [term_of(n, "fc", u, w) for n, u, w in zip("ab", updates, (0.7, -0.3), strict=False)]
    return summed(terms, how, rank)


def exact(one: Update, two: Update) -> torch.Tensor:
    return 0.7 * one.delta().double() - 0.3 * two.delta().double()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", WAYS)
def test_kernels_are_summed_in_their_own_shape(how: str, shape: tuple[int, ...]) -> None:
    one, two = update(shape), update(shape, seed=1)
    found = sum_of([one, two], how, 4 if how == "svd" else None)
    assert (found.shape, found.kind, found.stored) == (shape, "lora", None)
    close = distance(found.delta(), exact(one, two))
    assert (close > 1e-2) if how == "linear" else (close <= 1e-6)
    assert distance(0.9 * found.delta(), exact(one, two)) > 1e-2


def test_a_kernel_is_cut_to_the_nearest() -> None:
    one, two = update((5, 3, 2, 4)), update((5, 3, 2, 4), seed=1)
    found = sum_of([one, two], "svd", 1)
    values = torch.linalg.svdvals(exact(one, two).flatten(1))
    assert (found.rank, found.shape) == (1, (5, 3, 2, 4))
    wanted = float(values[1:].norm() / values.norm())
    assert distance(found.delta(), exact(one, two)) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("how", WAYS)
def test_a_flat_kernel_is_the_same_kernel(how: str) -> None:
    one, two = update((5, 3, 2, 4)), update((5, 3, 2, 4), seed=1)
    flat = replace(two, down=two.down.flatten(1))
    for terms in ([one, flat], [replace(one, down=one.down.flatten(1)), two]):
        found = sum_of(terms, how)
        assert found.shape == (5, 3, 2, 4)
        assert torch.equal(found.delta(), sum_of([one, two], how).delta())
    with pytest.raises(AdapterError, match="adapter b for one 23 -> 5;"):
        sum_of([one, update((5, 23))], how)


@pytest.mark.parametrize("kind", ["rslora", "adalora", "vera", "loha", "fused"])
@pytest.mark.parametrize("how", WAYS)
def test_every_kind_of_two_factors_becomes_lora(how: str, kind: str) -> None:
    stored = SourceRecord({"hada_w1_a": torch.ones(5, 2)}, {"alpha": 3})
    found = sum_of([update(kind=kind, stored=stored), update(seed=1)], how)
    same = sum_of([update(), update(seed=1)], how)
    assert (found.kind, found.stored) == ("lora", None)
    assert torch.equal(found.delta(), same.delta())
    assert distance(found.delta(), 0.9 * same.delta().double()) > 1e-2


@pytest.mark.parametrize("how", WAYS)
def test_a_sum_of_embeddings_is_of_an_embedding(how: str) -> None:
    by_leaves = SourceRecord({"lora_embedding_A": torch.ones(2, 3)})
    marked = [update(seed=i, stored=s) for i, s in enumerate((EMBEDDING, by_leaves, None))]
    for (i, one), (j, two) in itertools.product(enumerate(marked), repeat=2):
        found = sum_of([one, two], how, 1 if how == "svd" else None)
        settings = None if found.stored is None else dict(found.stored.settings)
        assert settings == (None if 2 in (i, j) else {"layer": "embedding"})
        assert found.stored is None or not found.stored.tensors


def identity(weight: Matrix) -> Matrix:
    return weight


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Scaling(row=torch.ones(5)), "adapter b, fc: an update of kind 'ia3'.*a weighted sum"),
        (WeightUpdate("lokr", identity, (5, 3)), "adapter b, fc: an update of kind 'lokr'"),
        (update(kind="dora", magnitude=torch.ones(5)), "adapter b, fc: an update of kind 'dora'"),
        (Update(torch.ones(2, 4, 3), torch.ones(6, 1), 1.0), "a grouped convolution"),
        (
            update((5, 3, 2)),
            r"fc: adapter a is made for a layer 3 -> 5, adapter b for one 3 -> 5 kernel \(2,\)",
        ),
    ],
)
@pytest.mark.parametrize("how", WAYS)
def test_what_is_no_such_product_is_refused(how: str, other: AnyUpdate, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        combine([(Adapter("a", {"fc": update()}), 0.7), (Adapter("b", {"fc": other}), 0.3)], how)
