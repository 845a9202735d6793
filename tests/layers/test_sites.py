from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lora_fx import Adapter, inject, trace
from lora_fx.adapters.other_updates import WeightUpdate
from lora_fx.algebra.matrix_expr import Sum, constant, product
from lora_fx.layers.sites import by_path, readers, sites
from lora_fx.testing import Attention, zoo


def test_a_site_is_read_into_a_record(ragged: Any) -> None:
    first, second, third, last = sites(trace(ragged))
    assert (first.path, first.shape, first.transposed) == ("wide", (5, 3), False)
    assert (first.in_features, first.out_features, first.dtype) == (3, 5, torch.float32)
    assert (first.weight.target, first.bias.target) == ("wide.weight", "wide.bias")
    assert first.input.op == "placeholder"
    assert (second.path, third.path, last.bias) == ("again", "again", None)


def test_sites_are_grouped_by_path(ragged: Any) -> None:
    groups = by_path(trace(ragged))
    assert {path: len(calls) for path, calls in groups.items()} == {
        "wide": 1,
        "again": 2,
        "narrow": 1,
    }


def test_a_module_with_several_weights_has_a_site_for_each() -> None:
    gm = trace(Attention(6).eval(), (torch.randn(2, 7, 6),))
    assert [site.path for site in sites(gm)] == ["layer", "layer.out_proj"]


def test_a_computed_weight_is_no_site() -> None:
    class Masked(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight * 2, self.bias)

    assert sites(trace(Masked(3, 5))) == []


def test_calls_of_an_adapter_that_makes_a_weight_anew_are_no_sites(ragged: Any, x: Any) -> None:
    """``P W + W`` is computed as ``addmm(W, P, W)``, which is a layer where a model says it."""
    turning = constant(torch.randn(5, 5))
    update = WeightUpdate("turned", lambda weight: Sum(product(turning, weight), weight), (5, 5))
    base = trace(ragged, (x,))
    injected = inject(base, Adapter("french", {"again": update}))
    assert torch.ops.aten.addmm.default in {node.target for node in injected.graph.nodes}
    assert [site.layer for site in sites(injected)] == [site.layer for site in sites(base)]


def test_readers_are_told_by_module_and_not_by_name() -> None:
    _, gm = zoo("qwen2")
    (call, source), *others = readers(gm, "lm_head.weight")
    assert not others
    assert call.target is torch.ops.aten.linear.default
    (table, same), *_ = readers(gm, "model.embed_tokens.weight")
    assert table.target is torch.ops.aten.embedding.default
    assert same.target == source.target
    assert list(readers(gm, "model.embed_tokens.bias")) == []


def test_a_vector_is_no_site() -> None:
    class Dots(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v = nn.Parameter(torch.randn(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.v)

    assert sites(trace(Dots())) == []
