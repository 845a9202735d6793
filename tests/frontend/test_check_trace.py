"""The graph is the model: what a tracer follows wrongly is refused, and nothing is changed."""

from __future__ import annotations

import functools
import gc
import itertools
import random
from collections.abc import Callable
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lora_fx import TraceError, trace
from lora_fx.numerics import compare, difference
from lora_fx.testing import Computes

FRONTENDS = ["symbolic", "export"]
Forward = Callable[[Any, torch.Tensor], Any]


def layer(compute: Forward) -> Computes:
    """A linear layer and whatever a case computes around it."""
    return Computes(compute, fc=nn.Linear(5, 5))


def model_of(compute: Forward) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), layer(compute)).eval()


def either(condition: Forward) -> Forward:
    return lambda m, x: m.fc(x) * 2 if condition(m, x) else m.fc(x) - 1


def attempt(compute: Forward) -> Forward:
    def tried(m: Any, x: torch.Tensor) -> Any:
        try:
            return compute(m, x)
        except Exception:  # whatever a tracer raises: that is the case
            return m.fc(x) - 1

    return tried


COUNT = itertools.count(1)
WRONG: dict[str, tuple[str, Forward]] = {
    "sparse count": ("export", either(lambda m, x: x.to_sparse()._nnz() == 0)),
    "is_compiling": ("export", either(lambda m, x: torch.compiler.is_compiling())),
    "is_exporting": ("export", either(lambda m, x: torch.compiler.is_exporting())),
    "type": ("export", either(lambda m, x: type(x) is torch.Tensor)),
    "numpy in a try": ("export", attempt(lambda m, x: m.fc(x) * float(x.numpy().sum()))),
    "isinstance": ("symbolic", either(lambda m, x: isinstance(x, torch.Tensor))),
    "list in a try": ("symbolic", attempt(lambda m, x: m.fc(x) * len(list(x)))),
    "grad mode": ("export", either(lambda m, x: torch.is_grad_enabled())),
    "a global counter": ("export", lambda m, x: m.fc(x) * next(COUNT)),
    "Python's random": ("export", lambda m, x: m.fc(x) * random.random()),
    "numpy's random": ("symbolic", lambda m, x: m.fc(x) * float(np.random.rand())),
    "a generator made anew": (
        "export",
        lambda m, x: m.fc(x) * float(np.random.default_rng().random()),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_graph_that_is_not_the_model_is_refused_by_module(case: str) -> None:
    frontend, compute = WRONG[case]
    x = torch.randn(4, 3)
    with pytest.raises(TraceError, match=r"not the model on the example inputs, first at 1: "):
        trace(model_of(compute), (x,), frontend=frontend)
    gm = trace(model_of(compute), (x,), frontend=frontend, check=False)  # control: it was traced
    assert not torch.equal(gm(x), model_of(compute)(x))


def test_the_cause_is_said_where_it_can_be_told() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(TraceError, match="1 draws numbers from random"):
        trace(model_of(WRONG["Python's random"][1]), (x,))
    with pytest.raises(TraceError, match="Two calls of the model itself differ"):
        trace(model_of(WRONG["a global counter"][1]), (x,))
    with pytest.raises(TraceError, match=r"torch\.where"):
        trace(model_of(WRONG["type"][1]), (x,))


def in_other_steps(factor: float) -> Forward:
    """A solver, and what stands for it where the model is exported, times a factor."""

    def compute(m: Any, x: torch.Tensor) -> Any:
        y = m.fc(x)
        system = torch.eye(5) + m.fc.weight.tril(-1)
        if torch.compiler.is_exporting():
            return y @ torch.linalg.inv(system).mT * factor
        return torch.linalg.solve_triangular(system.mT, y, upper=True, left=False)

    return compute


def test_another_way_that_a_model_has_for_exports_is_taken_if_its_numbers_are_the_same() -> None:
    torch.manual_seed(0)
    model, x = model_of(in_other_steps(1.0)), torch.randn(40, 3)
    found = trace(model, (x,))(x)
    assert compare(found, model(x)).ok
    assert not torch.equal(found, model(x)), "else this says nothing"
    with pytest.raises(TraceError, match="not the model on the example inputs, first at 1: "):
        trace(model_of(in_other_steps(1.01)), (x,))


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize(
    "compute",
    [
        lambda m, x: {"a": m.fc(x), "b": [x, (x + 1, None)]},
        lambda m, x: (m.fc(x), 3, 2.5, "s", x.shape[-1]),
        lambda m, x: m.fc(x / 0 - x / 0),  # NaN is equal to NaN
        lambda m, x: m.fc(x.mul_(2)),
        lambda m, x: m.fc(x).to(torch.float64),
        lambda m, x: m.fc(x) * torch.ones_like(x).bernoulli_(),
    ],
)
def test_what_agrees_is_traced(compute: Forward, frontend: str) -> None:
    trace(model_of(compute), (torch.randn(4, 3),), frontend=frontend)


def in_other_words(kind: str) -> nn.Module:
    """A linear layer whose call is more than the forward of its class."""
    model = nn.Linear(3, 3)
    plain = model.forward
    if kind == "hook":
        model.register_forward_hook(lambda m, a, y: {"y": y * 2})
    elif kind == "hook with kwargs":
        model.register_forward_hook(
            lambda m, a, k, y: y * 2 + k["input"], with_kwargs=True, always_call=True
        )
    elif kind == "pre-hook":
        model.register_forward_pre_hook(lambda m, a: (a[0] * 2,))
    elif kind == "pre-hook with kwargs":
        model.register_forward_pre_hook(
            lambda m, a, k: ((), {"input": k["input"] * 2}), with_kwargs=True
        )
    elif kind == "patched":
        model.forward = lambda input: plain(input) * 2  # type: ignore[method-assign]
    elif kind == "partial":
        model.forward = functools.partial(  # type: ignore[method-assign]
            lambda self, input: nn.functional.linear(input, self.weight) * 2, model
        )
    return model


KINDS = ["hook", "hook with kwargs", "pre-hook", "pre-hook with kwargs", "patched", "partial"]


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_and_a_forward_of_the_root_are_followed(kind: str, frontend: str) -> None:
    model, x = in_other_words(kind), torch.randn(4, 3)
    named = "kwargs" in kind
    gm = trace(model, () if named else (x,), {"input": x} if named else {}, frontend=frontend)
    got, wanted = (m(input=x) if named else m(x) for m in (gm, model))
    got, wanted = (v["y"] if kind == "hook" else v for v in (got, wanted))
    assert torch.equal(got, wanted)
    assert not torch.equal(got, nn.functional.linear(x, model.weight, model.bias))  # control
    assert {name for name, _ in gm.named_parameters()} <= {"weight", "bias"}


def test_a_forward_bound_to_a_model_with_shared_modules_is_followed() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    model.forward = MethodType(lambda self, x: type(self).forward(self, x) * 2, model)  # type: ignore[method-assign]
    x = torch.randn(4, 3)
    for frontend in FRONTENDS:
        assert torch.equal(trace(model, (x,), frontend=frontend)(x), model(x))


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_a_sparse_buffer_beside_is_kept_as_any_is(frontend: Any) -> None:
    """As Whisper has one, in the package of its authors."""
    model, x = model_of(lambda m, x: m.fc(x)), torch.randn(4, 3)
    heads = torch.eye(4).to_sparse()
    model.register_buffer("heads", heads)
    assert compare(trace(model, (x,), frontend=frontend)(x), model(x)).ok
    assert model.heads is heads
    assert heads.is_sparse


def test_the_model_and_all_random_states_stay_as_they_were() -> None:
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(3, 5), nn.BatchNorm1d(5)
            self.scale = nn.Parameter(torch.ones(5), requires_grad=False)
            self.plain, self.inner = torch.ones(()), {"t": torch.ones(())}
            self.calls, self.log, self.draws = 0, [], random.Random(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.log.append(x)
            self.draws.random()
            self.plain.add_(1)
            self.inner["t"].add_(1)
            self.scale.mul_(1.5)
            return nn.functional.dropout(self.norm(self.fc(x.mul_(2))) * self.scale)

    model, x = Changes().train(), torch.randn(4, 3)
    held = {**model.state_dict(), "plain": model.plain, "inner": model.inner["t"], "x": x}
    before = {name: value.clone() for name, value in held.items()}
    drawn = model.draws.getstate()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    trace(model, (x,))
    assert all(torch.equal(held[name], value) for name, value in before.items())
    assert (model.calls, model.log, model.draws.getstate()) == (0, [], drawn)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    with torch.no_grad():
        model(x)
    assert not any(torch.equal(held[n], before[n]) for n in ("plain", "inner", "x", "scale"))


class Pair(nn.Module):
    def __init__(self, is_one: Callable[[Any, Any], bool] = lambda a, b: False) -> None:
        super().__init__()
        self.fc, self.is_one = nn.Linear(3, 3), is_one

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.fc(a) * 3 if self.is_one(a, b) else self.fc(a) - 2 * self.fc(b)


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("is_one", [lambda a, b: a is b, lambda a, b: len({id(a), id(b)}) == 1])
def test_a_branch_on_one_tensor_given_twice_is_refused(is_one: Any, frontend: str) -> None:
    x = torch.randn(4, 3)
    with pytest.raises(TraceError, match=r"one tensor twice.*\.clone\(\)"):
        trace(Pair(is_one), (x, x), frontend=frontend)
    gm = trace(Pair(is_one), (x, x.clone()), frontend=frontend)
    assert gm(x, -x).shape == (4, 3)
    trace(Pair(), (x, x), frontend=frontend)  # control: who does not ask is traced


def test_a_branch_on_gaps_is_refused_and_gaps_alone_are_not() -> None:
    class Asks(Computes):
        pass

    model = Asks(lambda m, x: m.fc(x) * 2 if x.is_contiguous() else m.fc(x), fc=nn.Linear(5, 5))
    gapped = torch.randn(4, 10)[:, ::2]
    with pytest.raises(TraceError, match=r"\.contiguous\(\)"):
        trace(model, (gapped,))
    trace(model, (gapped.contiguous(),))
    plain = layer(lambda m, x: m.fc(x))
    assert torch.equal(trace(plain, (gapped,))(gapped), plain(gapped))


def test_attention_of_one_tensor_is_that_of_three() -> None:
    """torch multiplies a packed weight once or thrice, which rounds in two ways."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x, y, z = torch.randn(3, 2, 5, 8)
    got, wanted = trace(attention, (x, x, x))(x, y, z)[0], attention(x, y, z)[0]
    torch.testing.assert_close(got, wanted)
    # Nor does a draw that nobody looks at, as of models that drop layers, make a difference of it.
    attention.register_forward_pre_hook(lambda *_: None if random.random() < 2 else ())
    got = trace(attention, (x, x, x))(x, y, z)[0]
    torch.testing.assert_close(got, wanted)


@functools.lru_cache
def mask(size: int) -> torch.Tensor:
    return torch.ones(size, size).tril()


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_cache_that_tracing_would_fill_is_filled_with_values(is_frozen: bool) -> None:
    (gc.freeze if is_frozen else gc.unfreeze)()
    mask.cache_clear()
    model, x = model_of(lambda m, x: mask(x.shape[0]) @ m.fc(x)), torch.randn(4, 3)
    gm = trace(model, (x,))
    assert type(mask(4)) is torch.Tensor
    assert torch.equal(gm(x), model(x))
    assert (gc.get_freeze_count() > 0) == is_frozen


def test_an_exported_program_and_a_graph_are_checked_too() -> None:
    model, x = model_of(lambda m, x: m.fc(x)), torch.randn(4, 3)
    program = torch.export.export(model, (x,))
    gm = trace(program)
    assert torch.equal(gm(x), model(x))
    weight = next(node for node in gm.graph.nodes if node.op == "get_attr")
    again = trace(gm, (x,))
    assert torch.equal(again(x), model(x))
    assert weight.target in {node.target for node in again.graph.nodes}


def test_nothing_is_compared_without_values_or_inputs() -> None:
    compute = WRONG["isinstance"][1]
    trace(model_of(compute))
    with torch.device("meta"):
        trace(model_of(lambda m, x: m.fc(x)), (torch.randn(4, 3),))


ROWS: dict[str, Forward] = {
    "asked": either(lambda m, x: x.shape[0] == 1),
    "asked behind a layer": either(lambda m, x: m.fc(x).shape[0] > 1),
    "another word": lambda m, x: (m.fc(x), "one" if x.shape[0] == 1 else "several"),
}
FREE = ({0: "batch"},)


@pytest.mark.parametrize("case", ROWS)
def test_a_branch_on_one_row_is_refused(case: str) -> None:
    model, x = model_of(ROWS[case]), torch.randn(4, 3)
    with pytest.raises(
        TraceError, match=r"(?s)the batch is of one row, first at (1|the .*): .* torch.export.Dim"
    ):
        trace(model, (x,), dynamic_shapes=FREE)
    others: list[Any] = [None, ({0: torch.export.Dim("batch", min=2)},)]
    graphs = [trace(model, (x,), dynamic_shapes=shapes) for shapes in others]
    graphs.append(trace(model, (x,), dynamic_shapes=FREE, check=False))
    for gm in graphs:
        assert difference(gm(x), model(x)) is None
    assert difference(graphs[-1](x[:1]), model(x[:1])) is not None


def test_what_one_row_gives_or_refuses_alike_is_traced() -> None:
    def few(m: Any, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 1:
            raise ZeroDivisionError("one row")
        result: torch.Tensor = m.fc(x)
        return result

    x = torch.randn(4, 3)

    def rounded(m: Any, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = m.fc(x) / 3 * 3 if x.shape[0] == 1 else m.fc(x)
        return result

    for compute in (few, rounded, lambda m, x: m.fc(x) - m.fc(x).mean(0)):
        model = model_of(compute)
        assert torch.equal(trace(model, (x,), dynamic_shapes=FREE)(x), model(x))


def test_a_dictionary_that_the_model_adds_to_is_no_difference() -> None:
    """As sentence-transformers' modules do; a tensor of the caller's that changes is one."""

    def adding(m: Any, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        features.update(y=m.fc(features.pop("x")))
        return features

    model, given = Computes(adding, fc=nn.Linear(3, 5)), {"x": torch.randn(4, 3)}
    gm = trace(model, (given,))
    assert [*given] == ["x"]
    assert torch.equal(gm({**given})["y"], model({**given})["y"])
