"""``.train()`` and ``.eval()`` of a graph do what they do to its model, or are refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils import _pytree as pytree

import lora_fx
from lora_fx import LoraConfig, TraceError, fold, inject, trace
from lora_fx.testing import Computes

FRONTENDS = ["symbolic", "export"]


def calls(call: Callable[[torch.Tensor, bool], torch.Tensor]) -> nn.Module:
    """A layer and a function of it and of the mode."""
    return Computes(lambda m, x: call(m.fc(x), m.training), fc=nn.Linear(3, 3))


class KeepsNorm(nn.Module):
    """Its first norm stays in eval mode, as that of a frozen backbone does."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.norm, self.drop = nn.BatchNorm1d(7), nn.BatchNorm1d(7), nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.norm(self.frozen(x)))

    def train(self, mode: bool = True) -> KeepsNorm:
        super().train(mode)
        self.frozen.eval()
        return self


def _beside(drop: Callable[..., torch.Tensor]) -> nn.Module:
    return calls(lambda x, on: drop(x, 0.5, on) + 2 * x)


FOLLOW: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)),
    "dropout in place": lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5, inplace=True)),
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(7)),
    "instance norm": lambda: nn.Sequential(nn.InstanceNorm1d(7, track_running_stats=True)),
    "channels": lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout1d(0.5)),
    "alpha dropout": lambda: nn.Sequential(nn.Linear(3, 3), nn.AlphaDropout(0.5)),
    "rrelu": lambda: nn.Sequential(nn.Linear(3, 3), nn.RReLU()),
    "lstm": lambda: nn.Sequential(nn.LSTM(3, 5, 2, dropout=0.5)),
    "function": lambda: calls(lambda x, on: F.dropout(x, 0.5, on)),
    "attention": lambda: calls(
        lambda x, on: F.scaled_dot_product_attention(x, x, x, None, 0.3 if on else 0.0)
    ),
    **{
        f"{drop.__name__} beside what it reads": partial(_beside, drop)
        for drop in (F.dropout, F.alpha_dropout, F.dropout1d, F.feature_alpha_dropout)
    },
    "a number": lambda: calls(lambda x, on: x * (2.0 if on else 1.0)),
    "always on": lambda: calls(lambda x, on: F.dropout(x, 0.5, True)),
    "always off": lambda: calls(lambda x, on: F.dropout(x, 0.5, False)),
    "a frozen part": KeepsNorm,
}


def outputs(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(5)
    with torch.no_grad():
        found: list[torch.Tensor] = pytree.tree_leaves(copy.deepcopy(module)(x))
    return found


def assert_same(gm: nn.Module, model: nn.Module, x: torch.Tensor) -> None:
    assert all(map(torch.equal, outputs(gm, x), outputs(model, x)))


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("name", FOLLOW)
def test_a_graph_follows_both_ways(name: str, start: bool, frontend: str) -> None:
    torch.manual_seed(0)
    model, x = FOLLOW[name]().train(start), torch.randn(4, 7, 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    gm = trace(model, (x,), frontend=frontend)
    for mode in (not start, start, not start):
        assert gm.train(mode) is gm
        assert gm.training is mode
        assert_same(gm, copy.deepcopy(model).train(mode), x)
    assert model.training is start
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    differs = not all(map(torch.equal, outputs(model.train(), x), outputs(model.eval(), x)))
    assert differs == (not name.startswith("always"))  # control: the mode matters


TURNS: dict[str, Callable[[], nn.Module]] = {
    "own branch": lambda: calls(lambda x, on: x * 2 if on else x),
    "dropout in one mode": lambda: calls(lambda x, on: F.dropout(x, 0.5) if on else x),
    "other operator": lambda: calls(lambda x, on: x.relu() if on else x.tanh()),
}


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("name", TURNS)
def test_a_model_that_takes_another_way_is_refused_by_name(
    name: str, start: bool, frontend: str
) -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), TURNS[name]()).train(start), torch.randn(4, 7, 3)
    gm = trace(model, (x,), frontend=frontend)
    was = lora_fx.text(gm)
    with pytest.raises(TraceError, match=r"Sequential was traced in .* mode.*: 1 computes"):
        gm.train(not start)
    assert (gm.training, lora_fx.text(gm)) == (start, was)
    gm.train(start)
    assert_same(gm, model, x)


def _under_autocast(x: torch.Tensor, on: bool) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return x @ F.dropout(x, 0.5, on).mT


def _on_a_condition(x: torch.Tensor, on: bool) -> Any:
    return torch.cond(x.sum() > 0, lambda t: 3 * F.dropout(t, 0.5, on), torch.sin, (x,))


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("call", [_under_autocast, _on_a_condition])
def test_a_block_is_compared_and_not_switched(call: Callable[..., Any], start: bool) -> None:
    x = torch.rand(4, 7, 3)
    modes = lambda m, x: call(x, m.training), lambda m, x: call(x, False)
    turns, same = (nn.Sequential(nn.Dropout(0.5), Computes(f)).train(start) for f in modes)
    refused, follows = trace(turns, (x,)), trace(same, (x,))
    with pytest.raises(TraceError, match=r"Sequential was traced in .* mode.*: 1 computes"):
        refused.train(not start)
    assert refused.training is start
    assert_same(follows.train(not start), same.train(not start), x)  # control: the block has none


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_what_passes_make_of_a_graph_follows(frontend: str) -> None:
    model, x = FOLLOW["dropout"]().eval(), torch.randn(4, 7, 3)
    gm = trace(model, (x,), frontend=frontend)
    tuned = inject(gm, LoraConfig(r=2, dropout=0.4, target_modules=["0"], seed=0))
    tuned.train()
    assert not torch.equal(tuned(x), tuned(x))
    assert torch.equal(gm(x), model(x))  # the graph that went in stays as it was
    twin = copy.deepcopy(tuned)
    assert not torch.equal(twin(x), twin(x))
    tuned.eval()
    assert torch.equal(tuned(x), model(x))
    folded = fold(tuned).train()
    assert not torch.equal(folded(x), folded(x))
    assert torch.equal(trace(tuned, (x,)).train().eval()(x), model(x))


def test_a_graph_whose_model_has_no_modes_trains() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).eval(), torch.randn(4, 7, 3)
    tuned = inject(trace(model, (x,)), LoraConfig(r=2, dropout=0.4, target_modules=["0"]))
    torch.nn.init.ones_(dict(tuned.named_parameters())["0.lora_B.default"])
    assert torch.equal(tuned(x), tuned(x))
    tuned.train()
    assert not torch.equal(tuned(x), tuned(x))


def test_symbolic_graphs_follow_without_inputs() -> None:
    model, x = FOLLOW["function"]().eval(), torch.randn(4, 7, 3)
    assert_same(trace(model).train(), copy.deepcopy(model).train(), x)
    with pytest.raises(TraceError, match="computes something else"):
        trace(TURNS["own branch"]().eval()).train()


def recorded(gm: fx.GraphModule) -> Any:
    return pickle.loads(pickle.dumps(gm))


def test_where_the_model_is_not_known_a_recorded_flag_is_refused() -> None:
    x = torch.randn(4, 7, 3)
    program = torch.export.export(FOLLOW["dropout"]().eval(), (x,))
    again = recorded(trace(nn.Sequential(FOLLOW["function"]()).eval()))
    block = trace(torch.export.export(calls(_under_autocast).eval(), (x,)))
    of_root = r"itself \(dropout\)"
    for gm, path in ((trace(program), r"1 \(dropout\)"), (again, of_root), (block, of_root)):
        assert gm.eval() is gm
        with pytest.raises(TraceError, match=f"{path}.*lora_fx.trace"):
            gm.train()
        assert not gm.training
    plain = trace(torch.export.export(nn.Sequential(nn.Linear(3, 3)), (x,)))
    assert plain.train().training
    live = recorded(trace(FOLLOW["dropout"]().eval())).train()
    assert not torch.equal(live(x), live(x))


class Attends(nn.Module):
    """Makes a copy of what attention gives, which is none where it is laid out so already."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (p.unflatten(-1, (2, 4)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        kept = 0.5 if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=kept).transpose(1, 2).contiguous()
        result: torch.Tensor = self.out(y.reshape(*x.shape))
        return result


@pytest.mark.parametrize("start", [False, True])
def test_a_copy_that_one_mode_does_not_need_is_no_difference(start: bool) -> None:
    torch.manual_seed(0)
    model, x = Attends(), torch.randn(3, 5, 8)
    gm = trace(model.train(start), (x,))
    for mode in (True, False, True):
        gm.train(mode)
        torch.manual_seed(1)
        wanted = model.train(mode)(x)
        torch.manual_seed(1)
        assert torch.equal(gm(x), wanted)
    gm.eval()
    assert not torch.equal(gm(x), wanted)  # control: dropout was on
