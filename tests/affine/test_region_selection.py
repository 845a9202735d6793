from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lora_fx import fold, text, trace
from lora_fx.affine.region_selection import maximal_regions
from lora_fx.affine.transfer import analyse
from lora_fx.passes import FoldLora
from lora_fx.testing import Computes


class Turn(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(-1, -2)


def layers(function: Callable[..., Any]) -> nn.Module:
    one, two, norm = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.LayerNorm(4)
    sizes = {"down": (4, 2), "up": (2, 4), "gain": (4,), "square": (4, 4)}
    modules = {"table": nn.Embedding(9, 4), "norm": norm, "turn": Turn()}
    return Computes(function, sizes, one=one, two=two, **modules)


def regions_of(
    function: Callable[..., Any], chains: bool = False
) -> list[tuple[str, str, int, bool]]:
    found = maximal_regions(analyse(trace(layers(function))), chains)
    return [(r.value.node.name, r.layer.name, len(r.nodes), bool(r.blocked)) for r in found]


CASES: dict[str, tuple[Callable[..., Any], list[tuple[str, str, int, bool]]]] = {
    "a lone layer": (lambda m, x: m.one(x), []),
    "a chain without a parallel path": (lambda m, x: m.two(m.one(x)), []),
    "a low-rank bottleneck": (lambda m, x: x @ m.down @ m.up, []),
    "a layer and a branch": (
        lambda m, x: m.one(x) + x @ m.down @ m.up,
        [("add", "linear", 4, False)],
    ),
    "a scaled layer": (lambda m, x: m.one(x) * 2, [("mul", "linear", 2, False)]),
    "two regions in a row": (
        lambda m, x: (lambda h: m.two(h) + h @ m.down @ m.up)(m.one(x) * 2),
        [("add", "linear_1", 4, False), ("mul", "linear", 2, False)],
    ),
    "a region inside a larger one": (
        lambda m, x: (m.one(x) + x @ m.down @ m.up) * 2 + m.two(x),
        [("add_1", "linear", 7, False)],
    ),
    "the layer is read outside": (
        lambda m, x: (lambda y: (y + x @ m.down @ m.up, torch.relu(y)))(m.one(x)),
        [("add", "linear", 4, True)],
    ),
    "an embedding, then a projection": (lambda m, x: m.one(m.table(x)), []),
    "a norm's weight in front of a projection": (lambda m, x: m.one(m.norm(x)), []),
    "a vector behind a layer": (lambda m, x: m.one(x) * m.gain, [("mul", "linear", 2, False)]),
    "a vector in front of a layer": (lambda m, x: m.one(x / m.gain.exp()), []),
    "a number and a tied weight": (
        lambda m, x: (m.one(x) * 2, torch.relu(m.one(torch.relu(x)))),
        [],
    ),
    "a vector and a tied weight": (
        lambda m, x: (m.one(x) * m.gain, torch.relu(m.one(torch.relu(x)))),
        [("mul", "linear", 2, False)],
    ),
    "a layer and moves alone": (lambda m, x: m.one(x).transpose(-1, -2).contiguous(), []),
    "a move of somebody else": (
        lambda m, x: torch.tanh(m.turn(m.one(x) + x @ m.down @ m.up)),
        [("add", "linear", 4, False)],
    ),
    "a bias with a factor": (
        lambda m, x: torch.add(x @ m.square, m.gain, alpha=2),
        [("add", "matmul", 2, False)],
    ),
    "a bias": (lambda m, x: x @ m.square + m.gain, []),
    "another layer is free": (
        lambda m, x: (lambda y: (y + m.two(x), torch.relu(y)))(m.one(x)),
        [("add", "linear_1", 3, False)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_regions_are_maximal_and_hold_a_layer(name: str) -> None:
    function, expected = CASES[name]
    assert regions_of(function) == expected


CHAINS: dict[str, tuple[Callable[..., Any], list[tuple[str, str, int, bool]]]] = {
    "linear after linear": (
        lambda m, x: m.two(m.one(x)),
        [("linear_1", "linear", 2, False)],
    ),
    "an embedding, then a projection": (
        lambda m, x: m.one(m.table(x)),
        [("linear", "embedding", 2, False)],
    ),
    "nothing in between may go": (
        lambda m, x: (lambda y: (m.two(y), torch.relu(y)))(m.one(x)),
        [("linear_1", "linear", 2, True)],
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_fold_when_asked(name: str) -> None:
    function, expected = CHAINS[name]
    assert regions_of(function) == []
    found = regions_of(function, chains=True)
    assert [region[:1] + region[2:] for region in found] == [
        region[:1] + region[2:] for region in expected
    ]


def test_reshapes_around_a_layer_are_kept() -> None:
    def around(m: Any, x: torch.Tensor) -> Any:
        flat = torch.addmm(m.gain, x.view(-1, 4), m.one.weight.T.contiguous())
        return flat.view(4, 7, 4) + x @ m.down @ m.up

    module, x = layers(around), torch.randn(4, 7, 4)
    folded = fold(trace(module, (x,)))
    assert text(folded).count("view(") == 2
    assert text(folded).count("addmm(") == 1
    assert "matmul" not in text(folded)
    torch.testing.assert_close(folded(x), module(x))


def test_a_layer_with_arguments_by_name_stays() -> None:
    """Those of a folded one are by position, and the stride would be lost."""
    conv = nn.Conv1d(3, 5, 2, stride=2, bias=False)
    model, x = Computes(lambda m, x: m.conv(x) * 2, conv=conv), torch.randn(4, 3, 8)
    gm = trace(model, (x,), frontend="export")
    (call,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.conv1d.default)
    assert FoldLora()(gm).modified
    call.args, call.kwargs = call.args[:2], {"stride": [2]}
    torch.testing.assert_close(fold(gm)(x), model(x))


def test_only_what_is_read_is_replaced() -> None:
    """A region between another one's layer and its source: not a region of its own."""

    def nested(m: Any, x: torch.Tensor) -> Any:
        y = m.two(x) + x @ m.down @ m.up
        pieces = torch.chunk(y, 2, -1)
        return m.one(torch.cat((pieces[1], pieces[0]), -1))

    module, x = layers(nested), torch.randn(3, 4)
    torch.testing.assert_close(fold(trace(module))(x), module(x))


class Shaped(nn.Module):
    """Takes the shape of another layer's result, and its dtype, on the way to a layer."""

    def __init__(self, like: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 5), nn.Linear(5, 5)
        self.like = like

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(x.flatten(0, 1))
        return torch.tanh(self.two(self.like(torch.tanh(y).view(4, 7, 5), y)))


LIKE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "view_as": lambda y, like: y.view_as(like),
    "reshape_as": lambda y, like: y.reshape_as(like),
    "type_as": lambda y, like: y.type_as(like),
}


@pytest.mark.parametrize("name", LIKE)
def test_who_gives_a_shape_is_no_part_of_a_region(name: str) -> None:
    gm = trace(Shaped(LIKE[name]).eval(), (torch.randn(4, 7, 3),))
    assert text(fold(gm)) == text(gm)
    assert not FoldLora()(gm).modified
    assert {len(region.nodes) for region in maximal_regions(analyse(gm)) if region.layer} <= {1}
