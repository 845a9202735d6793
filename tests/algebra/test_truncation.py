"""The nearest product of low rank, against the whole decomposition of the dense matrix."""

from __future__ import annotations

import math

import pytest
import torch

from lora_fx.algebra import truncation
from lora_fx.algebra.evaluate import dense
from lora_fx.algebra.matrix_expr import Kron, Matrix, Product, Sum, constant, number, scaled
from lora_fx.algebra.truncation import cut, of_tensor, rank_of, svd_of


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    make = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=make, dtype=torch.float64)


def falling(rows: int, columns: int) -> torch.Tensor:
    """A matrix whose singular values fall by a tenth each."""
    left, right = (torch.linalg.qr(drawn(n, min(rows, columns)))[0] for n in (rows, columns))
    return left @ torch.diag(0.9 ** torch.arange(min(rows, columns)).double()) @ right.T


MATRICES: dict[str, Matrix] = {
    "tensor": constant(drawn(11, 7)),
    "product": Product(constant(drawn(23, 4)), constant(drawn(4, 17))),
    "two products": Sum(
        Product(constant(drawn(23, 2)), constant(drawn(2, 17))),
        scaled(number(-3), Product(constant(drawn(23, 3, seed=1)), constant(drawn(3, 17)))),
    ),
    "wide product": Product(constant(drawn(5, 9)), constant(drawn(9, 4))),
    "kron": Kron(constant(drawn(3, 4)), constant(drawn(5, 2))),
    "kron of low rank": Kron(constant(drawn(3, 1) @ drawn(1, 4)), constant(drawn(5, 2))),
    "zeros": constant(torch.zeros(4, 6, dtype=torch.float64)),
}


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("name", MATRICES)
def test_a_cut_is_the_nearest_there_is_and_its_error_is_told(name: str, rank: int) -> None:
    matrix = MATRICES[name]
    whole = dense(matrix, torch.float64)
    svd = svd_of(matrix, rank, None)
    count = rank_of(svd, max(whole.shape), rank, None)
    found = cut(svd, count, torch.float64)
    values = torch.linalg.svdvals(whole)
    size = float(values.norm())
    assert found.up.shape == (whole.shape[0], count)
    assert count <= rank
    best = float(values[rank:].norm())
    left = float((whole - found.up @ found.down).norm())
    assert left == pytest.approx(best, abs=1e-12)
    assert found.error * size == pytest.approx(best, abs=1e-12)
    if size:
        assert float((whole - 1.1 * found.up @ found.down).norm()) > left + 1e-3 * size


def test_factors_are_not_multiplied_out() -> None:
    narrow = Product(constant(drawn(300_000, 2)), constant(drawn(2, 200_000)))  # 480 GB
    found = cut(svd_of(narrow, 1, None), 1, torch.float32)
    assert found.up.shape == (300_000, 1)
    assert 0 < found.error < 1
    pair = Kron(constant(drawn(700, 3)), constant(drawn(400, 100)))  # of 84 million numbers
    assert svd_of(pair, 2, None).values.shape == (300,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_error_of_a_whole_rank_is_the_rounding(dtype: torch.dtype) -> None:
    whole = drawn(9, 3) @ drawn(3, 14)
    found = cut(of_tensor(whole, None, 1.0), 3, dtype)
    left = whole - found.up.double() @ found.down.double()
    assert found.error == pytest.approx(float(left.norm() / whole.norm()), rel=1e-6)
    assert 0 < found.error < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_an_energy_is_held_by_the_fewest(energy: float) -> None:
    whole = falling(40, 30)
    svd = of_tensor(whole, None, energy)
    count = rank_of(svd, 40, None, energy)
    held = [cut(svd, n, torch.float64) for n in (count, count - 1)]
    assert 1 - held[0].error ** 2 >= energy - 1e-12
    assert 1 - held[1].error ** 2 < energy


def test_a_large_matrix_is_sketched_as_well_as_decomposed() -> None:
    whole = falling(1200, 1100)
    svd = of_tensor(whole, 8, None)
    assert len(svd.values) == 8 + truncation._MORE  # no others were computed
    found = cut(svd, 8, torch.float64)
    values = 0.9 ** torch.arange(1100).double()
    assert torch.allclose(svd.values[:8], values[:8], rtol=1e-9)
    assert found.error == pytest.approx(float(values[8:].norm() / values.norm()), rel=1e-9)
    assert float((whole - found.up @ found.down).norm() / whole.norm()) == pytest.approx(
        found.error, rel=1e-9
    )


def test_a_large_matrix_of_low_rank_is_found_again() -> None:
    whole = drawn(1300, 5) @ drawn(5, 1100)
    for rank, energy in ((8, None), (None, 1.0)):
        svd = of_tensor(whole, rank, energy)
        assert rank_of(svd, 1300, rank, energy) == 5
        assert cut(svd, 5, torch.float64).error < 1e-12
        assert cut(svd, 4, torch.float64).error > 0.1


def test_a_sketch_grows_until_it_holds_the_energy() -> None:
    whole = falling(1200, 1100)
    svd = of_tensor(whole, None, 0.99)
    count = rank_of(svd, 1200, None, 0.99)
    assert count == math.ceil(math.log(0.01) / (2 * math.log(0.9)))
    flat = torch.linalg.qr(drawn(1200, 1100))[0]
    assert rank_of(of_tensor(flat, None, 0.5), 1200, None, 0.5) == 550


def test_nothing_but_rounding_is_never_kept() -> None:
    svd = of_tensor(drawn(9, 2) @ drawn(2, 7), 5, None)
    assert rank_of(svd, 9, 5, None) == 2
    assert rank_of(of_tensor(torch.zeros(3, 4), 2, None), 4, 2, None) == 1


@pytest.mark.parametrize("rank", [2, 20])
def test_the_size_of_an_expression_is_that_of_the_matrix(rank: int) -> None:
    up, down = torch.randn(24, rank), torch.randn(rank, 17)
    expression = scaled(number(3.0), Product(constant(up), constant(down)))
    expected = float((3.0 * up.double() @ down.double()).norm())
    assert truncation.size_of(expression) == pytest.approx(expected, rel=1e-12)
    nothing = Sum(expression, scaled(number(-1), expression))
    assert truncation.size_of(nothing) < 1e-12 * expected


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_many_small_values_are_kept_and_roundings_are_not(size: float) -> None:
    """Each small value is below the rows times the first's rounding; all together are not."""
    left, right = (torch.linalg.qr(drawn(n, 500))[0] for n in (600, 500))
    values = torch.full((500,), 5e-5, dtype=torch.float64)
    values[:3] = 1.0
    low = left[:, :3] @ right[:3]
    for whole, rank in ((left @ torch.diag(values) @ right, 500), (low, 3)):
        tensor = (size * whole).float()
        svd = of_tensor(tensor, None, 1.0)
        assert rank_of(svd, 600, None, 1.0) == rank
        found = cut(svd, rank, torch.float32)
        exact = tensor.double()
        error = float((found.up.double() @ found.down.double() - exact).norm() / exact.norm())
        assert max(error, found.error) <= 1e-5
        assert (
            float((low.float().double() * size - exact).norm() / exact.norm()) > 5e-4 or rank == 3
        )
        three = cut(svd, 3, torch.float32).error
        assert three == pytest.approx(float((exact - size * low).norm() / exact.norm()), abs=1e-5)
