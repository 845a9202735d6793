"""Two updates of one weight, and what a graph remembers of what was injected."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn

from lora_fx import Adapter, AdapterError, LoraConfig, Update, adapter_from, fold, inject, trace
from lora_fx.adapters.source_record import SourceRecord
from lora_fx.graph.example import example_of
from lora_fx.injection.injected_adapters import injected, tensors_of
from lora_fx.testing import Attention, relative

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.b(torch.tanh(self.a(x)))
        return y


def update(into: int, out: int, seed: int) -> Update:
    make = torch.Generator().manual_seed(seed)
    return Update(torch.randn(2, into, generator=make), torch.randn(out, 2, generator=make), 1.5)


@pytest.mark.parametrize(
    ("model", "x", "out", "paths"),
    [
        (Two, X, 4, ("a", "b")),
        (lambda: nn.Sequential(nn.Linear(4, 4)), X, 4, ("0", "0.weight")),
        (lambda: Attention(4), X[None], 12, ("layer", "layer.in_proj_weight")),
    ],
)
def test_two_updates_of_one_weight_are_refused_by_both_names(
    model: Any, x: torch.Tensor, out: int, paths: tuple[str, str]
) -> None:
    gm = trace(model().eval(), (x,))
    one, other = update(4, out, 1), update(4, out, 2)
    for given in ((one, other), (other, one)):
        with pytest.raises(AdapterError, match=rf"{paths[0]} and {paths[1]} are one layer"):
            inject(gm, Adapter("n", dict(zip(paths, given, strict=True))))
    same = inject(gm, Adapter("n", dict.fromkeys(paths, one)))
    alone = inject(gm, Adapter("n", {paths[0]: one}))
    assert relative(same(x), alone(x)) == 0
    assert relative(gm(x), alone(x)) > 1e-2


def test_two_values_of_one_parameter_are_refused() -> None:
    gm = trace(Two().eval(), (X,))
    names = ("a.bias", "b.bias")
    with pytest.raises(AdapterError, match=r"a\.bias and b\.bias are one parameter"):
        inject(gm, Adapter("n", {}, dict(zip(names, torch.randn(2, 4), strict=True))))
    with pytest.raises(AdapterError, match=r"a\.bias is replaced by adapter n too"):
        inject(gm, [Adapter(n, {}, {"a.bias": torch.randn(4)}) for n in "nm"])
    one = torch.randn(4)
    both = inject(gm, Adapter("n", {}, dict.fromkeys(names, one)))
    assert relative(inject(gm, Adapter("n", {}, {"b.bias": one}))(X), both(X)) == 0
    assert relative(gm(X), both(X)) > 1e-2


def test_a_module_of_two_names_trains_one_update() -> None:
    gm = trace(Two().eval(), (X,))
    tuned = inject(gm, LoraConfig(r=2, init="gaussian", name="n"))
    trained = [p for p in tuned.parameters() if p.requires_grad]
    assert len(trained) == 2
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(1)
    read = adapter_from(tuned)
    assert [*read.updates] == ["a"]
    assert relative(inject(gm, read)(X), tuned(X)) < 1e-6
    assert relative(gm(X), tuned(X)) > 1e-2


def test_a_graph_remembers_what_was_given_and_what_was_left_out() -> None:
    gm = trace(nn.Sequential(nn.Linear(4, 5)).eval(), (X,))
    given = Adapter("n", {"0": update(4, 5, 1), "1": update(5, 3, 1)})
    (record,) = injected(fold(inject(gm, given, strict=False)))
    assert list(record.adapter.updates) == ["0"]
    assert (record.tensors, tensors_of(record.adapter)) == (4, 2)
    assert injected(gm) == ()


def test_a_pickle_drops_the_module_and_the_records() -> None:
    gm = trace(nn.Sequential(nn.Linear(4, 5)).eval(), (X,))
    record = injected(inject(gm, Adapter("n", {"0": update(4, 5, 1)})))
    assert pickle.loads(pickle.dumps(record)) == ()
    example = example_of(gm)
    assert example is not None
    assert example.model is not None
    assert pickle.loads(pickle.dumps(example.model)) is None


def test_tensors_are_counted_as_the_file_has_them() -> None:
    one = update(4, 5, 1)
    stored = SourceRecord({"a": torch.ones(1), "b": torch.ones(1), "shared": one.down})
    kept = Update(one.down, one.up, 1.0, stored=stored)
    assert tensors_of(Adapter("n", {"0": kept, "1": kept}, {"2.bias": torch.ones(3)})) == 4
