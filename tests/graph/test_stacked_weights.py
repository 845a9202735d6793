"""Stacked constants: what they hold, when they are computed, and what spoils them."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from lora_fx import trace
from lora_fx.graph.graph_module import assign
from lora_fx.graph.lazy_tensor import LazyTensor, TensorSnapshot
from lora_fx.graph.stacked_weights import Factors


@pytest.fixture
def gm() -> fx.GraphModule:
    torch.manual_seed(0)
    return trace(nn.Linear(3, 5).requires_grad_(False).eval(), (torch.randn(4, 7, 3),))


def held(gm: fx.GraphModule, name: str, *shape: int, trained: bool = False) -> TensorSnapshot:
    assign(gm, name, nn.Parameter(torch.randn(*shape), requires_grad=trained))
    return TensorSnapshot.of(gm, name)


def factors(gm: fx.GraphModule, trained: bool = False) -> Factors:
    downs = held(gm, "a", 3, 2, trained=trained), held(gm, "c", 3, 1)
    ups = (held(gm, "b", 2, 5), 1.5), (held(gm, "d", 1, 5), 1.0)
    return Factors(downs, ups, (held(gm, "e", 5), held(gm, "f", 5)))


def test_factors_are_put_beside_each_other(gm: fx.GraphModule) -> None:
    both = factors(gm)
    down, up = both.down(False, torch.float32), both.up(False, torch.float32)
    assert both.rank == 3
    torch.testing.assert_close(down @ up, gm.a @ gm.b * 1.5 + gm.c @ gm.d)
    assert ((down @ up) - (gm.a @ gm.b + gm.c @ gm.d)).abs().max() > 1e-2
    torch.testing.assert_close(both.bias(torch.float32), gm.e + gm.f)


def test_a_column_of_zeros_and_the_bias_as_a_row(gm: fx.GraphModule) -> None:
    both = factors(gm)
    down, up = both.down(True, torch.float32), both.up(True, torch.float32)
    assert (down.shape, up.shape) == ((3, 4), (4, 5))
    assert not down[:, 3].any()
    torch.testing.assert_close(up[3], gm.e + gm.f)


def test_a_scale_is_rounded_once(gm: fx.GraphModule) -> None:
    up = TensorSnapshot("b", torch.full((1, 1), 3.0, dtype=torch.float16), 0)
    one = Factors((), ((up, 1 / 3),), ())
    assert one.up(False, torch.float16).item() == 1.0


@pytest.mark.parametrize("trained", [False, True])
def test_constants_are_computed_when_read_unless_a_factor_is_trained(
    gm: fx.GraphModule, trained: bool
) -> None:
    both = factors(gm, trained)
    value = both.promise((3, 3), torch.float32, lambda: both.down(False, torch.float32), "a")
    assert both.is_trained == trained
    assert (value._cached is not None) == trained


def test_equal_constants_have_equal_keys(gm: fx.GraphModule) -> None:
    one, other = factors(gm), factors(gm)
    same = Factors(one.downs, one.ups, one.biases)

    def key(of: Factors, name: str = "a") -> LazyTensor:
        return of.promise((3, 3), torch.float32, lambda: of.down(False, torch.float32), name)

    assert key(one).equals(key(same))
    assert not key(one).equals(key(other))
    assert not key(one).equals(key(one, "b"))
