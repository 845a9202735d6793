from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_fx import Adapter, Update, fold, inject, text, trace
from lora_fx.testing import Computes, relative, zoo

SIZES = {"w": (5, 3), "b": (5,), "k1": (5, 3, 2), "k2": (5, 3, 2, 2)}


FLAT, LONG, IDS = torch.randn(4, 3), torch.randn(2, 3, 8), torch.tensor([[0, 4], [2, 1]])
IMAGE = torch.randn(2, 3, 6, 8)
SPELLED: dict[str, tuple[Callable[..., Any], torch.Tensor, str]] = {
    "keywords": (lambda m, x: F.linear(bias=m.b, weight=m.w, input=x), FLAT, "aten.linear.default"),
    "no bias": (lambda m, x: F.linear(x, m.w, None), FLAT, "aten.linear.default"),
    "addmm": (lambda m, x: torch.addmm(m.b, x, mat2=m.w.T), FLAT, "aten.addmm.default"),
    "embedding": (lambda m, x: F.embedding(x, m.w, padding_idx=-1), IDS, "aten.embedding.default"),
    "conv1d": (lambda m, x: F.conv1d(x, m.k1, m.b, 2), LONG, "aten.conv1d.default"),
    "conv2d": (
        lambda m, x: F.conv2d(x, m.k2, stride=(1, 2), padding=1, dilation=(2, 1)),
        IMAGE,
        "aten.conv2d.default",
    ),
    "padding by name": (
        lambda m, x: F.conv1d(x, m.k1, dilation=2, padding="same"),
        LONG,
        "aten.conv1d.padding",
    ),
    "no padding by name": (
        lambda m, x: torch.conv2d(x, m.k2, m.b, padding="valid"),
        IMAGE,
        "aten.conv2d.padding",
    ),
}


@pytest.mark.parametrize("name", SPELLED)
def test_every_spelling_of_a_layer_becomes_its_aten_call(name: str) -> None:
    function, x, target = SPELLED[name]
    module = Computes(function, SIZES)
    for frontend in ("symbolic", "export"):
        gm = trace(module, (x,), frontend=frontend)
        assert target in {str(node.target) for node in gm.graph.nodes}
        assert torch.equal(gm(x), module(x))


KEPT: dict[str, tuple[Callable[..., Any], torch.Tensor]] = {
    "renormalising": (lambda m, x: F.embedding(x, m.w, max_norm=1.0), IDS),
    "factors": (lambda m, x: torch.addmm(m.b, x, m.w.T, beta=2), FLAT),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_no_plain_layer_stays_as_it_was_called(name: str) -> None:
    function, x = KEPT[name]
    module = Computes(function, SIZES)
    gm = trace(module)
    assert not any(str(node.target).startswith("aten.") for node in gm.graph.nodes)
    with torch.no_grad():
        assert torch.equal(gm(x), module(x))


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_a_convolution_that_pads_by_name_is_a_layer(padding: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 5, 2, padding=padding, dilation=2), nn.Tanh()).eval()
    gm = trace(model, (LONG,), frontend="symbolic")
    one = Update(torch.randn(2, 3, 2), torch.randn(5, 2), 1.5)
    folded = fold(inject(gm, Adapter("french", {"0": one})))
    changed = copy.deepcopy(model).requires_grad_(False)
    changed[0].weight.add_(one.delta())
    assert text(folded) == text(gm)
    assert relative(folded(LONG), changed(LONG)) <= 1e-5
    assert relative(gm(LONG), changed(LONG)) > 1e-2


def test_tensors_are_fetched_where_they_are_read_and_notes_are_gone() -> None:
    _, gm = zoo("bert")
    nodes = list(gm.graph.nodes)
    assert not any("_assert_tensor_metadata" in node.name for node in nodes)
    place = {node: index for index, node in enumerate(nodes)}
    for node in nodes:
        if node.op == "get_attr":
            first = min(place[user] for user in node.users)
            assert all(n.op == "get_attr" for n in nodes[place[node] : first])


class Unread(nn.Module):
    """Calls whose results nobody reads: of a layer, of numbers that are drawn, of a write."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.pool = nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        torch.tanh(self.pool(y).chunk(3, -1)[1])
        torch.rand(2)
        self.count.add_(1)
        return y + torch.rand(3)


def test_what_nobody_reads_goes_unless_it_draws_or_writes() -> None:
    gm = trace(Unread().eval(), (FLAT,), check=False)
    names = [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]
    assert names.count("aten.linear.default") == 1
    assert names.count("aten.rand.default") == 2
    assert any("add" in name for name in names)
    assert not any("tanh" in name or "chunk" in name for name in names)
    gm(FLAT)
    assert gm.get_buffer("count") == 1
