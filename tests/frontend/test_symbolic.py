from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from lora_fx import TraceError, fold, inject, trace
from lora_fx.testing import make_adapter


class Flags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.register_buffer("shift", torch.randn(3))
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Any, mask: Any = None, twice: bool = False, gain: float = 1.0) -> Any:
        y = self.fc(x) * gain + self.shift
        y = y if mask is None else y * mask
        return self.norm(2 * y if twice else y)


def test_arguments_that_are_no_tensors_are_fixed_to_the_example() -> None:
    module, x = Flags().eval(), torch.randn(4, 3)
    gm = trace(module, (x,), {"twice": True}, frontend="symbolic")
    assert torch.equal(gm(x, twice=True), module(x, twice=True))
    with pytest.raises(AssertionError, match="specialized"):
        gm(x, twice=False)


def test_numbers_that_are_left_out_stay_free() -> None:
    module, x = Flags().eval(), torch.randn(4, 3)
    gm = trace(module)
    assert torch.equal(gm(x, gain=3.0), module(x, gain=3.0))
    assert torch.equal(gm(torch.randn(9, 3)[:1]).shape and gm(x), module(x))


def test_batch_norm_stays_a_module_with_its_mode_and_buffers() -> None:
    module = Flags().train()
    gm = trace(module)
    assert gm.norm.training
    assert gm.norm.running_mean is module.norm.running_mean
    gm.eval()
    assert module.norm.training


def test_a_failure_names_the_module(x: Any) -> None:
    class Loops(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for row in x:
                x = x + row
            return x

    with pytest.raises(TraceError, match="for row in x"):
        trace(nn.Sequential(Loops()))


class Ordered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, x: Any) -> Any:
        y = self.fc(x)
        return OrderedDict(y=y, more=[OrderedDict(twice=2 * y), {"x": x}])


def test_an_ordered_dictionary_stays_one() -> None:
    module, x = Ordered().eval(), torch.randn(4, 3)
    gm = trace(module, (x,), frontend="symbolic")
    folded = fold(inject(gm, make_adapter({"fc": (5, 3)})))
    for graph, is_same in ((gm, True), (copy.deepcopy(gm), True), (folded, False)):
        found = graph(x)
        assert [type(one) for one in (found, *found["more"])] == [OrderedDict, OrderedDict, dict]
        assert torch.equal(found["more"][0]["twice"], 2 * module(x)["y"]) is is_same
