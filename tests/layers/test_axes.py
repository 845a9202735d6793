from __future__ import annotations

import pytest
import torch

from lora_fx.layers.axes import convert, names_of, shape_of, sizes_of


def test_a_star_stands_for_the_further_axes() -> None:
    assert names_of("r in *k", 2) == ["r", "in", "k0", "k1"]
    assert names_of("out r 1*", 1) == ["out", "r", "1"]
    assert names_of("out r 1*", 0) == ["out", "r"]


def test_a_shape_comes_of_sizes() -> None:
    sizes = {"in": 3, "out": 5, "r": None}
    assert shape_of("in r *k", sizes, (7, 2)) == (3, None, 7, 2)
    assert shape_of("out r 1*", sizes, (7, 2)) == (5, None, 1, 1)


@pytest.mark.parametrize(
    ("axes", "shape", "sizes"),
    [
        ("r in *k", (2, 3), {"r": 2, "in": 3}),
        ("r in *k", (2, 3, 7), {"r": 2, "in": 3, "k0": 7}),
        ("r in *k", (2,), None),
        ("r in", (2, 3, 7), None),
        ("out r 1*", (5, 2, 1), {"out": 5, "r": 2}),
        ("out r 1*", (5, 2, 3), None),
        ("n n", (5, 5), {"n": 5}),
        ("n n", (5, 4), None),
    ],
)
def test_sizes_come_of_a_shape_that_fits(axes: str, shape: tuple[int, ...], sizes: object) -> None:
    found = sizes_of(axes, shape)
    assert found == (None if sizes is None else {"1": 1, **sizes})  # type: ignore[dict-item]


def test_converting_moves_axes_and_is_undone() -> None:
    x = torch.randn(5, 2, 7, 3)
    turned = convert(x, "out in *k", "in out *k")
    assert torch.equal(turned, x.transpose(0, 1))
    assert turned.data_ptr() == x.data_ptr()
    assert torch.equal(convert(turned, "in out *k", "out in *k"), x)


def test_axes_of_one_are_put_in_and_taken_out() -> None:
    up = torch.randn(5, 2)
    stored = convert(up, "out r", "out r 1*", 2)
    assert stored.shape == (5, 2, 1, 1)
    assert torch.equal(convert(stored, "out r 1*", "out r"), up)
    assert convert(up[:, :0], "out r", "r out").shape == (0, 5)
