"""Writes into new memory become values; whatever may share memory in other ways stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from lora_fx import trace
from lora_fx.graph.aliasing import Memory
from lora_fx.graph.memory_views import viewed
from lora_fx.graph.ops import mutates, written_arguments
from lora_fx.testing import Computes

X = torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([True, False, True, True, False])


def traced(function: Callable[..., Any]) -> tuple[Any, Any, int]:
    """What the graph computes, what the module does, and how many writes are left."""
    module = Computes(function, mask=nn.Buffer(MASK))
    gm = trace(module, (X.clone(),))
    memory, left = Memory(gm.graph), 0
    for write in gm.graph.nodes:
        left += mutates(write)
        earlier = [n for into in written_arguments(write) for n in memory.group(into) if n < write]
        readers = {user for node in earlier for user in node.users if user > write}
        assert all(n.op == "output" or viewed(n) for n in readers), "read before and after"
    return gm(X.clone()), module(X.clone()), left


def masked(m: Any, x: torch.Tensor) -> Any:
    y = x.new_zeros(4, 7, 5)
    y.view(-1, 5)[:, m.mask] = x.reshape(-1, 3)
    return y


def sliced(m: Any, x: torch.Tensor) -> Any:
    y = torch.zeros(4, 7, 5)
    y[..., 1:4] = x
    return y + 1


def twice(m: Any, x: torch.Tensor) -> Any:
    y = torch.zeros(4, 7, 5)
    y[..., :3] = x
    y[..., 2:] += x
    return y


def through_views(m: Any, x: torch.Tensor) -> Any:
    y = x.clone()
    flat = y.view(28, 3)
    turned = y.transpose(0, 1)
    turned[:, :, 0] = 2.0
    return y, flat, turned


def added(m: Any, x: torch.Tensor) -> Any:
    y = x * 2
    before = y + 0
    y.add_(x).mul_(3)
    return before, y


def of_a_narrower_dtype(m: Any, x: torch.Tensor) -> Any:
    y = x.half() + 1
    y.add_(x)
    return y


def one_of_several_results(m: Any, x: torch.Tensor) -> Any:
    values, places = torch.topk(x, 2, -1)
    values /= values.sum(-1, keepdim=True)
    return places + 1, values


WHOLE = (one_of_several_results, masked, sliced, twice, through_views, added, of_a_narrower_dtype)
GONE = {f.__name__: f for f in WHOLE}


@pytest.mark.parametrize("name", GONE)
def test_writes_into_new_memory_become_values(name: str) -> None:
    got, wanted, left = traced(GONE[name])
    got, wanted = ((v,) if isinstance(v, torch.Tensor) else v for v in (got, wanted))
    assert left == 0
    assert all(map(torch.equal, got, wanted))
    assert not torch.equal(1.1 * got[-1], wanted[-1])


def into_the_input(m: Any, x: torch.Tensor) -> Any:
    x[..., 0] = 1.0
    return x * 2


def shared_in_another_way(m: Any, x: torch.Tensor) -> Any:
    y = x.clone()
    other = y.as_strided((4, 7), (21, 3))
    y.mul_(2)
    later = y.view(-1)
    twice = later + other.sum()
    y.add_(1)
    return y + 0, other + 0, later + 0, twice


def laid_out_in_another_way(m: Any, x: torch.Tensor) -> Any:
    y = torch.zeros(7, 4, 3)
    flat = y.reshape(-1)
    torch.mul(x.transpose(0, 1), 2, out=y)  # as a value of its own it has x's strides: no view
    flat.add_(1)
    return y + 0, flat + 0


OTHERS = (into_the_input, shared_in_another_way, laid_out_in_another_way)
STAYS = {f.__name__: f for f in OTHERS}


@pytest.mark.parametrize("name", STAYS)
def test_other_writes_stay(name: str) -> None:
    got, wanted, left = traced(STAYS[name])
    got, wanted = ((v,) if isinstance(v, torch.Tensor) else v for v in (got, wanted))
    assert left > 0
    assert all(map(torch.equal, got, wanted))


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "same": lambda y: y,
    "slice": lambda y: y[..., 1:] if y.shape[-1:] > (1,) else y,
    "select": lambda y: y[1],
    "transpose": lambda y: y.transpose(0, -1),
    "flat": lambda y: y.reshape(-1) if not y.is_contiguous() else y.view(-1),
    "detach": lambda y: y.detach(),
    "unsqueeze": lambda y: y.unsqueeze(0),
}
WRITES: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "add": lambda y, x: y.add_(x.sum()),
    "mul": lambda y, x: y.mul_(-2),
    "fill": lambda y, x: y.fill_(3.0),
    "copy": lambda y, x: y.copy_(x.mean().expand(y.shape)),
    "zero": lambda y, x: y.zero_(),
    "put": lambda y, x: y.__setitem__((..., 0), 5.0),
}
STEP = st.tuples(
    st.integers(0, 5), st.sampled_from(sorted(VIEWS)), st.sampled_from(["none", *sorted(WRITES)])
)


@settings(max_examples=60, deadline=None)
@given(st.lists(STEP, min_size=1, max_size=6))
@example([(0, "select", "add"), (0, "detach", "add")])
def test_60_random_programs_of_views_and_writes_compute_what_they_did(
    steps: list[tuple[int, str, str]],
) -> None:
    def program(m: Any, x: torch.Tensor) -> Any:
        seen = [x * 2, torch.zeros(4, 7, 3)]
        kept = []
        for which, view, write in steps:
            source = seen[which % len(seen)]
            y = VIEWS[view](source if view != "select" or source.shape[:1] > (1,) else x * 3)
            seen.append(y)
            kept.append(y.sum() * 1)
            if write != "none" and y.ndim:
                WRITES[write](y, x)
        return (*kept, *(y + 0 for y in seen))

    got, wanted, _ = traced(program)
    assert all(map(torch.equal, got, wanted))


class Spectral(nn.Module):
    """A layer of a neural operator: some frequencies times weights, the others 0."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(3, 5)
        self.kept = nn.Parameter(torch.randn(2, 5, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = torch.fft.rfft(self.into(x), dim=1)
        kept = torch.zeros_like(found)
        kept[:, :2] = found[:, :2] * self.kept
        return torch.fft.irfft(kept, n=7, dim=1)


def test_a_write_of_complex_numbers_has_the_gradients_of_the_model() -> None:
    model = Spectral().eval()
    gm = trace(model, (X,))
    wanted = torch.autograd.grad(model(X).square().sum(), model.into.weight)[0]
    loss = gm(X).square().sum()
    found = torch.autograd.grad(loss, gm.get_parameter("into.weight"))[0]
    assert torch.allclose(found, wanted, rtol=1e-5)
    assert found.norm() > 1e-2


OVER_ALL: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as it is": lambda h: torch.empty_like(h).copy_(h * 2),
    "assigned": lambda h: (y := torch.zeros_like(h)).__setitem__(..., h.sin()) or y,
    "repeated": lambda h: torch.zeros_like(h).copy_(h[:1]),
    "in another type": lambda h: torch.zeros_like(h, dtype=torch.float64).copy_(h),
    "turned": lambda h: torch.empty(h.mT.shape).copy_(h.mT).view(-1, 7).tanh(),
    "a part, in another type": lambda h: h.double().slice_scatter(h.double()[1:], end=3) * 2,
}


@pytest.mark.parametrize("name", OVER_ALL)
def test_what_overwrites_all_of_a_tensor_has_the_gradients_of_the_model(name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 5), Computes(lambda m, x: OVER_ALL[name](x))).eval()
    gm = trace(model, (X,))
    assert torch.equal(gm(X), model(X))
    wanted = torch.autograd.grad(model(X).square().sum(), model[0].weight)[0]
    found = torch.autograd.grad(gm(X).square().sum(), gm.get_parameter("0.weight"))[0]
    assert torch.allclose(found, wanted, rtol=1e-5)
    assert found.norm() > 1e-2


def test_writes_under_vmap_are_what_they_were() -> None:
    def mapped(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y[:, :1] = 2.0
        return torch.vmap(lambda row: (row * y.sum()).sin_().clone().mul_(3))(y)

    got, wanted, _ = traced(mapped)
    assert torch.equal(got, wanted)
