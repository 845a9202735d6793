from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import lora_fx
from lora_fx.graph.constants import Constants
from lora_fx.layers.sites import sites
from lora_fx.layers.weight_parts import Grid, calls_of, expression_of, grid_of, part_of
from lora_fx.testing import Computes, make_adapter, relative


class Cuts(nn.Module):
    def __init__(self, shape: tuple[int, ...], cut: Any) -> None:
        super().__init__()
        self.w, self.cut = nn.Parameter(torch.randn(shape)), cut

    def forward(self) -> Any:
        return self.cut(self.w)


def operand(shape: tuple[int, ...], cut: Any) -> tuple[fx.GraphModule, Any]:
    gm = fx.symbolic_trace(Cuts(shape, cut))
    return gm, gm.graph.output_node().args[0]


CUTS: list[tuple[tuple[int, ...], Any, Any]] = [
    ((6, 5), lambda w: w[2:5], (range(2, 5), None, False)),
    ((6, 5), lambda w: w[:, 1::2], (None, range(1, 4, 2), False)),
    ((6, 5), lambda w: w[1:3, [4, 0]], (range(1, 3), (4, 0), False)),
    ((6, 5), lambda w: w.t(), (None, None, True)),
    ((6, 5), lambda w: w.t()[:, 2:4], (range(2, 4), None, True)),
    ((6, 6), lambda w: w.t(), (None, None, True)),
    ((6, 5), lambda w: w.view(2, 3, 5)[1], (range(3, 6), None, False)),
    ((6, 5), lambda w: w[4:5], (range(4, 5), None, False)),
    ((6, 5), lambda w: w.clone(), (None, None, False)),
    ((6, 5), lambda w: w[[1, 1, 1]], ((1, 1, 1), None, False)),
    ((6, 5, 3), lambda w: w[2:4, :2], (range(2, 4), range(2), False)),
    ((6,), lambda w: w[::2], (range(0, 5, 2), None, False)),
    ((6,), lambda w: w.flip(0), ((5, 4, 3, 2, 1, 0), None, False)),
]


@pytest.mark.parametrize(("shape", "cut", "wanted"), CUTS)
def test_a_part_is_rows_and_columns(shape: tuple[int, ...], cut: Any, wanted: Any) -> None:
    gm, value = operand(shape, cut)
    part = part_of(gm, value)
    assert part is not None
    assert part[1:4] == wanted
    assert part.source.target == "w"
    assert part.calls[-1] is value
    assert all(source is part.source or source.target == "w" for _, source in part.reads)


@pytest.mark.parametrize(
    ("shape", "cut"),
    [
        ((6, 5), lambda w: w.reshape(5, 6)),
        ((6, 5), lambda w: w[0]),
        ((6, 5), lambda w: w.view(2, 3, 5)),
        ((6, 5, 3), lambda w: w.transpose(0, 1)),
        ((6, 5, 3), lambda w: w[..., :2]),
        ((6, 5), lambda w: w.diagonal()),
        ((6, 5), lambda w: w * 2),
    ],
)
def test_what_is_no_rows_and_columns_is_no_part(shape: tuple[int, ...], cut: Any) -> None:
    assert part_of(*operand(shape, cut)) is None


def test_the_stored_tensor_is_all_of_itself() -> None:
    gm, value = operand((6, 5), lambda w: w)
    part = part_of(gm, value)
    assert part is not None
    assert part[1:] == (None, None, False, (), ())
    assert part_of(gm, None) is None


def test_what_an_adapter_made_stands_for_the_stored_tensor() -> None:
    gm, value = operand((6, 5), lambda w: (w * 2)[2:4])
    made, source = value.args[0], value.args[0].args[0]
    assert part_of(gm, value) is None
    part = part_of(gm, value, {made: source})
    assert part is not None
    assert (part.source, part.rows, part.reads) == (source, range(2, 4), ((value, made),))


def takes(take: Callable[[Any], Any], own: bool) -> nn.Module:
    """Reads something of a weight, or of what stands beside it."""
    return Computes(
        lambda m, x: x @ take(m if own else m.w),
        {"w": (6, 5), "other": (6, 5)},
        index=nn.Buffer(torch.tensor([4, 1])),
    )


def grid(take: Callable[[Any], Any], own: bool = False) -> Grid | None:
    """What is picked, from a graph of torch's own functions and methods."""
    tracer = fx.Tracer()
    tracer.proxy_buffer_attributes = True
    model = takes(take, own)
    graph = tracer.trace(model)
    gm = fx.GraphModule(model, graph)
    value = graph.output_node().args[0].args[1]  # type: ignore[union-attr]
    calls = calls_of(value, {})  # type: ignore[arg-type]
    stored = {node: node for node in calls if node.op == "get_attr" and node.target == "w"}
    expression = expression_of(gm, calls, stored) if stored else None
    return grid_of(expression) if expression else None


PICKS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda w: w,
    "slice": lambda w: w[2:5],
    "view": lambda w: w.view(2, 3, 5)[1].t(),
    "step": lambda w: w[1::2, ::3],
    "list": lambda w: w[[5, 0, 3]],
    "repeated": lambda w: w[:1].expand(4, 5),
    "copied": lambda w: torch.cat([w[:2], w[4:]]).contiguous(),
    "flipped": lambda w: torch.roll(w.flip(1), 2, 0),
    "idle cast": lambda w: w.to(torch.float32)[3:],
    "of its sizes": lambda w: w[: w.shape[0] // w.size(0) + 1],
}


@pytest.mark.parametrize("name", PICKS)
def test_what_only_picks_and_moves_is_places(name: str) -> None:
    found = grid(PICKS[name])
    assert found is not None
    places = torch.tensor(found.origin)
    for offsets in found.offsets:
        places = places[..., None] + offsets
    assert torch.equal(places, PICKS[name](torch.arange(30).reshape(6, 5)))


COMPUTES: dict[str, Callable[[Any], Any]] = {
    "twice": lambda w: w[:3] * 2,
    "once": lambda w: w * 1.5,
    "abs": lambda w: w.abs(),
    "clamp": lambda w: w.clamp(-50, 50),
    "sort": lambda w: w.sort(0)[0],
    "relu": lambda w: torch.relu(w),
    "half": lambda w: w.half(),
    "bits": lambda w: w.view(torch.int32),
    "masked": lambda w: w.tril(),
    "padded": lambda w: nn.functional.pad(w, (0, 1)),
    "sum": lambda w: w.view(2, 3, 5).sum(0),
    "added": lambda w: w + w,
    "dropped": lambda w: nn.functional.dropout(w, 0.5, True),
    "written": lambda w: w[:3].mul_(1),
    "nothing": lambda w: w[6:],
    "fails": lambda w: w.view(7, 7),
    "no grid": lambda w: torch.stack([w[0, :2], w[1, [4, 0]]]),
}


@pytest.mark.parametrize("name", COMPUTES)
def test_what_computes_is_none(name: str) -> None:
    assert grid(COMPUTES[name]) is None


def test_a_stored_index_picks_and_another_weight_does_not() -> None:
    found = grid(lambda model: model.w[model.index], own=True)
    assert found is not None
    assert (found.origin, found.offsets[0].tolist()) == (20, [0, -15])
    assert grid(lambda model: torch.cat([model.w, model.other]), own=True) is None
    assert grid(lambda model: model.w.index_select(0, model.index), own=True) is not None


def test_activations_and_long_ways_are_given_up() -> None:
    graph = fx.symbolic_trace(nn.Sequential(nn.Tanh())).graph
    assert calls_of(next(iter(graph.output_node().all_input_nodes)), {}) == []

    def long(w: Any) -> Any:
        for _ in range(80):
            w = w.t()
        return w

    assert grid(long) is None


def test_layers_of_one_kind_are_looked_at_once() -> None:
    grid_of.cache_clear()
    for _ in range(3):
        assert grid(lambda w: w[2:5]) is not None
    assert grid_of.cache_info().misses == 1


def test_what_torch_func_maps_over_means_nothing_outside() -> None:
    """One of several weights is a value of its transform alone; the layer behind is as ever."""
    model = Computes(
        lambda m, x: m.head(torch.vmap(lambda w: x @ w.t())(m.w)),
        {"w": (4, 5, 3)},
        head=nn.Linear(5, 2),
    )
    gm = lora_fx.trace(model, (torch.randn(7, 3),))
    assert [site.path for site in sites(gm)] == ["head"]
    constants = Constants(gm)
    admitted = {n.name: constants.admit(n) for n in gm.graph.nodes if n.op != "placeholder"}
    assert (admitted["w"], admitted["_add_batch_dim"]) == (True, False)


@pytest.mark.parametrize("frontend", ["export", "symbolic"])
@pytest.mark.parametrize("kind", ["conv", "index"])
def test_a_layer_of_a_cut_kernel_or_of_rows_by_a_stored_index_is_adapted(
    kind: str, frontend: Any
) -> None:
    torch.manual_seed(0)
    rows = torch.tensor([4, 0, 2])
    shape = (6, 5, 3) if kind == "conv" else (6, 5)

    def run(weight: torch.Tensor, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return F.conv1d(x, weight[1:4]) if kind == "conv" else F.linear(x, weight[rows])

    model = Computes(lambda m, x: run(m.w, x, m.rows), {"w": shape}, rows=nn.Buffer(rows))
    x = torch.randn(4, 5, 7) if kind == "conv" else torch.randn(4, 5)
    gm = lora_fx.trace(model.eval(), (x,), frontend=frontend)
    assert [site.path for site in sites(gm)] == ["w"]
    adapter = make_adapter({"w": shape})
    wanted = run(adapter.updates["w"].weight(model.w.detach()), x, rows)
    with torch.no_grad():
        assert relative(lora_fx.inject(gm, adapter)(x), wanted) <= 1e-5
        assert relative(gm(x), wanted) > 1e-2
