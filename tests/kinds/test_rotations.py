import pytest
import torch

from lora_fx.kinds.oft import from_lycoris, from_peft


def skew_of(values):
    skew = torch.zeros(len(values), 3, 3, dtype=torch.float64)
    for place, (row, column) in enumerate([(0, 1), (0, 2), (1, 2)]):
        skew[:, row, column], skew[:, column, row] = values[:, place], -values[:, place]
    return skew


def test_are_rotations(noise):
    values = noise(4, 3, dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64).expand(4, 3, 3)
    exact = from_peft("oft_R.weight", values, {"use_cayley_neumann": False})
    other = from_lycoris(noise(4, 3, 3, dtype=torch.float64), 0)
    for rotation in (exact, other):
        assert torch.allclose(rotation @ rotation.mT, eye)
        assert torch.allclose(torch.linalg.det(rotation), eye[:, 0, 0])
        assert not torch.allclose(rotation, eye, atol=1e-2)


def test_the_series_tends_to_the_inverse_of_the_exact_one(noise):
    values = noise(4, 3, dtype=torch.float64) / 10
    exact = from_peft("oft_R.weight", values, {"use_cayley_neumann": False})
    gaps = []
    for terms in (1, 2, 3, 5, 40):
        settings = {"num_cayley_neumann_terms": terms}
        series = from_peft("oft_R.weight", values, settings)
        gaps.append(float((series - exact.mT).norm()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 1e-1
    assert gaps[-1] < 1e-12


@pytest.mark.parametrize(
    ("terms", "factors"), [(1, []), (2, [2]), (3, [2, 2, 1]), (4, [2, 2, 1]), (6, [2, 2, 2, 2, 1])]
)
def test_the_last_power_of_the_series_counts_once(terms, factors, noise):
    values = noise(4, 3, dtype=torch.float64)
    skew, expected = skew_of(values), torch.eye(3, dtype=torch.float64).expand(4, 3, 3)
    for exponent, factor in enumerate(factors, 1):
        expected = expected + factor * torch.linalg.matrix_power(skew, exponent)
    series = from_peft("oft_R.weight", values, {"num_cayley_neumann_terms": terms})
    assert torch.allclose(series, expected)


def test_a_limit_shortens_what_is_longer(noise):
    blocks = noise(4, 3, 3, dtype=torch.float64)
    size = float((blocks - blocks.mT).norm())
    assert torch.equal(from_lycoris(blocks, 2 * size), from_lycoris(blocks, 0))
    halved = from_lycoris(blocks, size / 2)
    assert torch.allclose(halved, from_lycoris(blocks / 2, 0))
    assert not torch.allclose(halved, from_lycoris(blocks, 0), rtol=1e-2)


def test_blocks_of_one_number_are_not_turned(noise):
    rotation = from_peft("oft_R.weight", noise(4, 0), {})
    assert torch.equal(rotation, torch.ones(4, 1, 1))
