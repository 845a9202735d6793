from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_fx import Adapter, PassError, Update, explain, fold, inject, text, trace, unfold
from lora_fx.layers.sites import by_path, sites
from lora_fx.testing import relative


class Parts(nn.Module):
    """Three calls on one weight; ``add`` is somebody's own LoRA on some of them."""

    def __init__(self, cut: Any, add: tuple[bool, bool, bool]) -> None:
        super().__init__()
        self.fc, self.cut, self.add = nn.Linear(5, 6), cut, add
        self.down, self.up = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(2, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, biases = self.cut(self.fc.weight), self.cut(self.fc.bias)
        ups = self.cut(self.up.t())
        total = torch.zeros(())
        for place, made in enumerate((torch.sin(x), torch.cos(x), x)):
            y = F.linear(made, weights[place], biases[place])
            if self.add[place]:
                y = y + made @ self.down @ ups[place].t()
            total = total + torch.tanh(y).square().sum(-1)
        return total


def apart(w: Any) -> Any:
    return w.chunk(3)


def meeting(w: Any) -> Any:
    return w, w[:3], w[2:]


def folded(cut: Any, add: tuple[bool, bool, bool]) -> Any:
    torch.manual_seed(0)
    model, x = Parts(cut, add).eval().requires_grad_(False), torch.randn(3, 7, 5)
    gm = trace(model, (x,))
    found = fold(gm)
    assert relative(found(x), model(x)) <= 1e-5
    assert text(unfold(found)) == text(gm)
    return found


def test_calls_that_are_not_folded_read_the_folded_weight() -> None:
    gm = folded(apart, (True, False, False))
    (target,) = {str(site.weight.target) for site in sites(gm)}
    assert target == "fc.weight"
    assert [site.outputs for site in by_path(gm)["fc"]] == [range(2), range(2, 4), range(4, 6)]
    assert "chunk(fc.bias, 3)" in text(gm)


def test_a_weight_that_changes_before_its_parts_are_read_is_refused() -> None:
    model, x = Parts(apart, (True, False, False)).eval().requires_grad_(False), torch.randn(3, 5)
    found = fold(trace(model, (x,)))
    model.fc.weight.mul_(2)
    with pytest.raises(PassError, match=r"^fc\.weight was changed in place.*fold again"):
        found(x)


def test_what_is_being_trained_is_folded_as_it_is_now() -> None:
    torch.manual_seed(0)
    model, x = Parts(apart, (True, False, True)).eval(), torch.randn(3, 5)
    found = fold(trace(model, (x,)))
    with torch.no_grad():
        before = model(x)
        model.down.add_(0.1)  # another step of training
        assert relative(found(x), before) <= 1e-5
        assert relative(model(x), before) > 1e-2


def test_parts_that_meet_stay_one_weight_if_they_agree() -> None:
    gm = folded(meeting, (True, True, True))
    assert {str(site.weight.target) for site in sites(gm)} == {"fc.weight"}


def test_parts_that_meet_and_differ_are_weights_of_their_own() -> None:
    gm = folded(meeting, (False, True, False))
    assert len({str(site.weight.target) for site in sites(gm)}) > 1


def test_a_weight_that_is_only_cut_is_left_alone() -> None:
    torch.manual_seed(0)
    model = Parts(apart, (False, False, False)).eval()
    gm = trace(model, (torch.randn(3, 7, 5),))
    assert text(fold(gm)) == text(gm)
    assert "becomes" not in str(explain(gm))


def test_another_who_reads_the_weight_keeps_what_it_was() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Parts(apart, (False,) * 3), Parts(apart, (False,) * 3)
            self.two.fc.weight = self.one.fc.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.one(x) - self.two(x)
            return y

    torch.manual_seed(0)
    model, x = Tied().eval().requires_grad_(False), torch.randn(3, 7, 5)
    gm = trace(model, (x,))
    update = Update(torch.randn(2, 5), torch.randn(6, 2), 0.5)
    (path, *_) = by_path(gm)
    found = inject(gm, Adapter("a", {path: update}))
    assert relative(fold(found)(x), found(x)) <= 1e-5
    assert relative(gm(x), found(x)) > 1e-2
    assert by_path(fold(found)).keys() == by_path(gm).keys()
