"""What the outputs of a file are held to: the precision of the numbers that its graph has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from lora_fx import fold, inject, trace
from lora_fx.export.program.shape_variants import Case
from lora_fx.export.report import Reference
from lora_fx.export.verification.rows import Row, precision
from lora_fx.testing import make_adapter


def folded(dtype: torch.dtype) -> fx.GraphModule:
    adapter = make_adapter({"0": (5, 3)})
    return fold(inject(trace(nn.Sequential(nn.Linear(3, 5, bias=False)).to(dtype)), adapter))


GRAPHS: dict[str, Callable[[torch.dtype], fx.GraphModule]] = {
    "a layer": lambda dtype: trace(nn.Linear(3, 5).to(dtype)),
    "one of two layers": lambda dtype: trace(
        nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4).to(dtype))
    ),
    "a module's parameter": lambda dtype: trace(nn.Sequential(nn.PReLU()).to(dtype)),
    "a module's buffers": lambda dtype: trace(
        nn.Sequential(nn.BatchNorm1d(3, affine=False)).to(dtype)
    ),
    "a weight that is computed when it is read": folded,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", GRAPHS)
def test_the_coarsest_numbers_say_it_wherever_they_are_held(name: str, dtype: torch.dtype) -> None:
    assert precision(GRAPHS[name](dtype)) == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_off_is_so_in_a_type_without_a_wider_one_too(dtype: torch.dtype) -> None:
    gm, x = trace(nn.Linear(3, 5).to(dtype)), torch.randn(4, 3, dtype=dtype)
    row = Row(Reference("model", gm), Case("", (x,), {}), optimise=True)
    y = gm(x).detach()
    for found, ok in ((y, True), (y * 1.001, False)):
        assert [check.ok for check in row.compare(["y"], [found.numpy()], [y])] == [ok]
