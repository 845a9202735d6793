"""A model whose next call gives something else is refused, with the name of what does it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_fx.errors import ExportError, TraceError
from lora_fx.export import to_onnx
from lora_fx.export.verification.stateful_calls import refuse_unsteady
from lora_fx.frontend.trace import trace

FRONTENDS = ["symbolic", "export"]


class State(nn.Module):
    """A layer that may change what it holds at each call."""

    def __init__(self, compute: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.fc, self.compute = nn.Linear(5, 5), compute
        self.register_buffer("count", torch.ones(()))
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("scratch", torch.zeros(4, 5))
        self.calls, self.last = 0, None
        self.log: list[int] = []
        self.draws, self.noise = random.Random(3), np.random.default_rng(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(self, x)


def model_of(compute: Callable[[Any, torch.Tensor], torch.Tensor]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), State(compute)).eval()


def set_to(module: Any, **values: Any) -> None:
    for name, value in values.items():
        setattr(module, name, value)


def counted(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.calls += 1
    return m.fc(x) * (2 if m.calls > 2 else 1)  # the first two calls agree


def remembered(m: Any, x: torch.Tensor) -> torch.Tensor:
    before, m.last = m.last, x
    return m.fc(x) if before is None else m.fc(x) + before


def logged(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.log.append(1)
    return m.fc(x) * len(m.log)


def assigned(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.count = m.count + 1
    return m.fc(x) * m.count


STATE: dict[str, tuple[str, Callable[[Any, torch.Tensor], torch.Tensor]]] = {
    "a buffer": (r"1\.count", lambda m, x: m.fc(x) * m.count.add_(1)),
    "a buffer that is assigned": (r"1\.count", assigned),
    "a running mean": (r"1\.mean", lambda m, x: m.fc(x) - m.mean.lerp_(x.mean(0), 0.1)),
    "a part of a buffer": (r"1\.scratch", lambda m, x: m.fc(x) + m.scratch[0].add_(x[0])),
    "a weight": (r"1\.fc\.bias", lambda m, x: m.fc(x) * m.fc.bias.detach().mul_(1.5)),
    "a Python counter": (r"1\.calls", counted),
    "what the last call left": (r"1\.last", remembered),
    "a list": (r"1\.log", logged),
    "a generator of Python": (r"1\.draws", lambda m, x: m.fc(x) * m.draws.random()),
    "a generator of numpy": (r"1\.noise", lambda m, x: m.fc(x) * float(m.noise.random())),
    "dropout without its flag": (r"1 \(dropout\)", lambda m, x: F.dropout(m.fc(x))),
    "random numbers": (r"1 \(rand_like\)", lambda m, x: m.fc(x) + torch.rand_like(x)),
    "numbers drawn in place": (
        r"1 \(bernoulli_\)",
        lambda m, x: m.fc(x) * torch.empty_like(x).bernoulli_(),
    ),
    "a branch on Python's random": (
        "1 draws numbers from random",
        lambda m, x: m.fc(x) if random.random() > 0.001 else x,
    ),
    "a branch on numpy's random, seldom taken": (
        r"1 draws numbers from numpy\.random",
        lambda m, x: x if np.random.uniform(0, 1) > 0.999 else m.fc(x),
    ),
    "a branch on Python's random, seldom taken and at no end": (
        "1 draws numbers from random",
        lambda m, x: x if 0.05 < random.random() < 0.1 else m.fc(x),
    ),
}


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", STATE)
def test_state_and_random_numbers_are_refused_by_name(
    name: str, frontend: str, tmp_path: Path
) -> None:
    said, compute = STATE[name]
    model, x = model_of(compute), torch.randn(4, 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random.seed(1)
    np.random.seed(1)
    gm = trace(model, (x,), frontend=frontend)
    with pytest.raises(ExportError, match=said):
        to_onnx(gm, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert (model[1].calls, model[1].last, model[1].log) == (0, None, [])


def unread(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.calls += 1
    m.last = x
    m.log.append(1)
    m.count.add_(1)
    y: torch.Tensor = m.fc(x)
    return y


STEADY: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "what no call reads": unread,
    "a buffer that each call fills": lambda m, x: m.fc(m.scratch.copy_(x)),
    "a draw that nobody looks at": lambda m, x: (
        x if random.random() < 0.9 and m.training else m.fc(x) + 0 * (np.random.randn() < 9)
    ),
    "dropout that is off": lambda m, x: F.dropout(m.fc(x), 0.5, m.training),
}


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", STEADY)
def test_what_the_next_call_does_not_read_is_exported(
    name: str, frontend: str, tmp_path: Path
) -> None:
    gm = trace(model_of(STEADY[name]), (torch.randn(4, 3),), frontend=frontend)
    assert to_onnx(gm, tmp_path / "model.onnx").verified


WRITES = {name: STATE[name][1] for name in ("a buffer", "a running mean", "a weight")}
FILLS = {name: STEADY[name] for name in ("a buffer that each call fills", "what no call reads")}
FILLS["a buffer of whose shape another is made"] = lambda m, x: (
    m.fc(m.scratch.copy_(x)) * (torch.zeros_like(m.scratch))
)


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", [*WRITES, *FILLS])
def test_a_graph_without_its_model_is_judged_by_what_it_writes(name: str, frontend: str) -> None:
    gm = trace(model_of((WRITES | FILLS)[name]), (torch.randn(4, 3),), frontend=frontend)
    gm.meta.clear()
    if name in FILLS:
        refuse_unsteady(gm)
        return
    with pytest.raises(ExportError, match=f"a call changes {STATE[name][0]}, and the next call"):
        refuse_unsteady(gm)


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_a_table_with_a_largest_norm_is_the_same_at_every_call(
    frontend: str, tmp_path: Path
) -> None:
    model, ids = nn.Sequential(nn.Embedding(9, 3, max_norm=0.5), nn.Linear(3, 2)), torch.arange(4)
    before = model[0].weight.detach().clone()
    gm = trace(model.eval(), (ids,), frontend=frontend)
    to_onnx(gm, tmp_path / "model.onnx")
    assert torch.equal(model[0].weight, before)
    model(ids)
    assert not torch.equal(model[0].weight, before)  # control: a call of the model renormalises


def test_a_model_in_training_is_judged_by_its_eval_mode(tmp_path: Path) -> None:
    x = torch.randn(4, 3)
    live = trace(model_of(STATE["dropout without its flag"][1]).train(), (x,))
    with pytest.raises(ExportError, match=r"1 \(dropout\)"):
        to_onnx(live, tmp_path / "model.onnx")
    turns = trace(model_of(lambda m, x: m.fc(x) * 2 if m.training else m.fc(x)).train(), (x,))
    with pytest.raises(TraceError, match="cannot be switched to eval mode: 1 computes"):
        to_onnx(turns, tmp_path / "model.onnx")
    number = trace(model_of(lambda m, x: m.fc(x) * (2.0 if m.training else 1.0)).train(), (x,))
    assert to_onnx(number, tmp_path / "model.onnx").verified
    assert list(tmp_path.iterdir()) == [tmp_path / "model.onnx"]
