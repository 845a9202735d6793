from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_fx import Adapter, Update, fold, inject, trace
from lora_fx.adapters.other_updates import WeightUpdate
from lora_fx.algebra.matrix_expr import Sum, constant, product
from lora_fx.layers.sites import bias_of, by_path, is_packed, paths_of, sites
from lora_fx.testing import Attention, Computes


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


class Modulated(nn.Module):
    """A kernel for each row, of its style: one convolution of as many groups as rows."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(1, 5, 3, 1))
        self.style = nn.Linear(2, 3)

    def forward(self, x: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        rows, _, length = x.shape
        kernels = (self.kernel * self.style(style)[:, None, :, None]).reshape(-1, 3, 1)
        y = F.conv1d(x.reshape(1, -1, length), kernels, groups=rows)
        return y.reshape(rows, -1, length)


def test_a_convolution_of_as_many_groups_as_rows_is_no_site() -> None:
    model, rows = Modulated().eval(), {0: "batch"}
    gm = trace(model, (torch.randn(2, 3, 7), torch.randn(2, 2)), dynamic_shapes=(rows, rows))
    assert [site.path for site in sites(gm)] == ["style"]
    adapter = Adapter("a", {"style": Update(torch.ones(1, 2), torch.ones(3, 1), 1.0)})
    folded, (x, style) = fold(inject(gm, adapter)), (torch.randn(4, 3, 7), torch.randn(4, 2))
    merged = copy.deepcopy(model)
    with torch.no_grad():
        merged.style.weight += 1
    assert torch.allclose(folded(x, style), merged(x, style), atol=1e-5)
    assert not torch.allclose(model(x, style), merged(x, style), atol=1e-2)


def test_calls_of_an_adapter_that_makes_a_weight_anew_are_no_sites(ragged: Any, x: Any) -> None:
    """``P W + W`` is computed as ``addmm(W, P, W)``, which is a layer where a model says it."""
    turning = constant(torch.randn(5, 5))
    update = WeightUpdate("turned", lambda weight: Sum(product(turning, weight), weight), (5, 5))
    base = trace(ragged, (x,))
    injected = inject(base, Adapter("french", {"again": update}))
    assert torch.ops.aten.addmm.default in {node.target for node in injected.graph.nodes}
    assert [site.layer for site in sites(injected)] == [site.layer for site in sites(base)]


def test_a_vector_is_no_site() -> None:
    class Dots(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v = nn.Parameter(torch.randn(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.v)

    assert sites(trace(Dots())) == []


PATHS: list[tuple[list[tuple[str, str, str]], str]] = [
    ([("fc", "fc.weight", "fc")], "a layer"),
    ([("head", "embed.weight", "head"), ("embed", "embed.weight", "embed")], "tied"),
    ([("", "fc.weight", "fc"), ("", "w", "w")], "called by the root"),
    ([("", "fc.weight", "fc.weight"), ("fc", "fc.weight", "fc")], "called by both"),
    ([("m", "m.w", "m.w")], "a bare weight alone"),
    ([("m", "m.v", "m.v"), ("m", "m.w", "m.w")], "two bare weights"),
    ([("m", "m.fc.weight", "m.fc")], "a layer that its owner calls"),
    (
        [("a", "a.in_proj_weight", "a"), ("a", "a.out_proj.weight", "a.out_proj")],
        "attention",
    ),
    ([("a", "a.out_proj.weight", "a.out_proj")], "attention whose projection is missed"),
    (
        [("a", "a.in_proj_weight_1", "a"), ("a", "a.out_proj.weight_2", "a.out_proj")],
        "attention, folded while others read the old weights",
    ),
    (
        [("b", "a.in_proj_weight", "b"), ("b", "a.out_proj.weight", "b.out_proj")],
        "attention under another name",
    ),
    ([("m", "m.a.in_proj_weight", "m.a")], "attention that its owner calls"),
    (
        [
            ("a", "a.q_proj_weight", "a.q_proj_weight"),
            ("a", "a.k_proj_weight", "a.k_proj_weight"),
            ("a", "a.v_proj_weight", "a.v_proj_weight"),
            ("a", "a.out_proj.weight", "a.out_proj"),
        ],
        "attention of several widths",
    ),
    (
        [("b", "a.q_proj_weight", "b.q_proj_weight"), ("b", "a.out_proj.weight", "b.out_proj")],
        "the same under another name",
    ),
    ([("m", "m.e.weight_1", "m.e.weight_1"), ("m", "m.e.weight_2", "m.e.weight_2")], "numbered"),
]


@pytest.mark.parametrize(("layers", "what"), PATHS, ids=[what for _, what in PATHS])
def test_layers_are_called_by_who_holds_their_weight(
    layers: list[tuple[str, str, str]], what: str
) -> None:
    wanted = {(path, name): called for path, name, called in layers}
    assert paths_of(wanted) == wanted


def test_the_packed_projection_is_told_by_its_name() -> None:
    assert is_packed("attn.in_proj_weight")
    assert is_packed("attn.in_proj_weight_1")
    assert not is_packed("in_proj_weight")  # of the root: nothing else it could be called
    assert not is_packed("attn.in_proj_bias")


def layer(run: Any) -> nn.Module:
    function = lambda m, x: run(m, x, m.fc.weight, m.fc.bias)  # noqa: E731
    return Computes(function, {"b": (2,)}, fc=nn.Linear(5, 6))


def parts(m: Any, x: Any, w: Any, b: Any) -> Any:
    return F.linear(x, w[:2], b[:2]) + F.linear(x, w[2:4]) + F.linear(x, w[4:], m.b)


def inputs(m: Any, x: Any, w: Any, b: Any) -> Any:
    return F.linear(x[..., 2:], w[:, 2:], b) + F.linear(x[..., :2], w[:, :2], 2 * b)


CASES: dict[str, tuple[Any, Any]] = {
    "whole": (lambda m, x, w, b: F.linear(x, w, b), lambda m: m.fc.bias),
    "none": (lambda m, x, w, b: F.linear(x, w), None),
    "computed": (
        lambda m, x, w, b: F.linear(x, w, torch.cat([b[:4], m.b])),
        lambda m: torch.cat([m.fc.bias[:4], m.b]),
    ),
    "parts": (parts, lambda m: torch.cat([m.fc.bias[:2], torch.zeros(2), m.b])),
    "summed": (inputs, lambda m: 3 * m.fc.bias),
    "twice": (
        lambda m, x, w, b: F.linear(F.linear(x, w, b)[..., :5], w, b).sum() + parts(m, x, w, b),
        None,
    ),
    "of an activation": (lambda m, x, w, b: F.linear(x, w, b * x.sum()), None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_bias_is_put_together_of_what_the_calls_have(name: str) -> None:
    run, wanted = CASES[name]
    torch.manual_seed(0)
    model = layer(run).eval().requires_grad_(False)
    gm = trace(model, (torch.randn(3, 5),))
    found = bias_of(gm, by_path(gm)["fc"])
    if name == "twice":  # the whole call's and the parts' agree where both have one
        assert found is not None
        assert torch.equal(found[:2], model.fc.bias[:2])
    elif wanted is None:
        assert found is None
    else:
        assert found is not None
        torch.testing.assert_close(found, wanted(model))
