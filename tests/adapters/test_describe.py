"""What is said of one layer's update, whatever its kind."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lora_fx.adapters.adapter import AnyUpdate, Scaling, Update, WeightUpdate
from lora_fx.adapters.describe import describe_update
from lora_fx.algebra.index_expr import listed
from lora_fx.algebra.matrix_expr import Matrix, Replaced, constant


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kernel", [(), (2,), (2, 4)])
def test_the_norm_is_that_of_the_product(kernel: tuple[int, ...]) -> None:
    update = Update(random(0, 2, 3, *kernel), random(1, 5, 2), -1.5)
    report = describe_update("fc", update)
    assert report["norm"] == pytest.approx(float(update.delta().norm()), rel=1e-5)
    assert 0.9 * report["norm"] != pytest.approx(float(update.delta().norm()), rel=1e-2)
    del report["norm"]
    shape = [5, 3, *kernel]
    assert report == {"path": "fc", "kind": "lora", "shape": shape, "rank": 2, "scale": -1.5}


def test_the_norm_of_a_grouped_convolution_is_that_of_the_kernel_it_computes() -> None:
    down, up = random(0, 4, 6, 3), random(1, 10, 2)
    impulses = torch.eye(6 * 3).reshape(18, 6, 3)
    kernel = F.conv1d(F.conv1d(impulses, down), up[:, :, None], groups=2)
    report = describe_update("conv", Update(down, up, 1.5))
    assert report["norm"] == pytest.approx(1.5 * float(kernel.norm()), rel=1e-5)
    assert (report["rank"], report["shape"]) == (4, [10, 6, 3])


def replaced(weight: Matrix) -> Matrix:
    index = listed(torch.tensor([1, 2]))
    assert index is not None
    return Replaced(weight, index, constant(TWOS))


TWOS = torch.full((4,), 2.0)
PLAIN = Update(torch.ones(2, 3), torch.ones(4, 2), 1.0)


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        (
            Update(PLAIN.down, PLAIN.up, 1.0, "dora", bias=TWOS[:4], magnitude=TWOS),
            {"kind": "dora", "shape": [4, 3], "bias_norm": 4.0, "magnitude_norm": 4.0},
        ),
        (
            Update(PLAIN.down, PLAIN.up, 1.0, row=TWOS, col=torch.ones(3)),
            {"row_norm": 4.0, "col_norm": pytest.approx(3**0.5)},
        ),
        (Scaling(row=TWOS), {"kind": "ia3", "shape": [4, None], "row_norm": 4.0}),
        (Scaling(col=TWOS), {"kind": "ia3", "shape": [None, 4], "col_norm": 4.0}),
        (
            WeightUpdate("oft", replaced, (4, None)),
            {"kind": "oft", "shape": [4, None], "norms": [4.0]},
        ),
    ],
)
def test_what_has_no_two_factors_shows_its_vectors(
    update: AnyUpdate, expected: dict[str, Any]
) -> None:
    report = describe_update("fc", update)
    assert {name: report[name] for name in expected} == expected
    extra = {"rank", "scale", "norm"} if isinstance(update, Update) else set()
    assert report.keys() - expected.keys() <= {"path", "kind", "shape"} | extra
    assert json.loads(json.dumps(report)) == report
