from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lora_fx.graph.lazy_tensor import LazyTensor, Parameters, get_unevaluated, set_lazy

VALUE = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


class Counted:
    """Makes a tensor, and counts how often."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> torch.Tensor:
        self.count += 1
        return VALUE.clone()


def promised() -> tuple[nn.Module, Counted, LazyTensor]:
    make = Counted()
    holder = nn.Linear(3, 5)
    deferred = LazyTensor((5, 3), torch.float32, make, "key")
    set_lazy(holder, "weight", deferred)
    return holder, make, deferred


def test_nothing_is_computed_before_it_is_read_and_once_after() -> None:
    holder, make, deferred = promised()
    assert get_unevaluated(holder, "weight") is deferred
    assert "weight" in holder._parameters
    assert list(holder._parameters) == ["weight", "bias"]
    assert make.count == 0
    first = holder.weight
    assert torch.equal(first, VALUE)
    assert isinstance(first, nn.Parameter)
    assert not first.requires_grad
    assert holder.weight is first
    assert make.count == 1


@pytest.mark.parametrize("read", ["state_dict", "named_parameters", "parameters", "call"])
def test_whoever_reads_gets_the_tensor(read: str) -> None:
    holder, make, _ = promised()
    x = torch.randn(2, 3)
    if read == "call":
        assert torch.equal(holder(x), nn.functional.linear(x, VALUE, holder.bias))
    elif read == "parameters":
        assert any(torch.equal(p, VALUE) for p in holder.parameters())
    else:
        found = getattr(holder, read)()
        assert torch.equal(dict(found)["weight"], VALUE)
    assert make.count == 1


def test_what_is_computed_for_somebody_who_goes_on_is_not_kept() -> None:
    _, make, deferred = promised()
    assert torch.equal(deferred.evaluate(), VALUE)
    assert torch.equal(deferred.evaluate(), VALUE)
    assert make.count == 2
    kept = deferred.materialize()
    assert deferred.evaluate() is kept
    assert make.count == 3


def test_promises_of_one_key_are_equal() -> None:
    one = LazyTensor((5, 3), torch.float32, Counted(), ("w", 1))
    assert one.equals(LazyTensor((5, 3), torch.float32, Counted(), ("w", 1)))
    assert not one.equals(LazyTensor((5, 3), torch.float32, Counted(), ("w", 2)))
    assert not one.equals(VALUE)


def test_copies_and_pickles_hold_tensors() -> None:
    for twin in (copy.deepcopy(promised()[0]), pickle.loads(pickle.dumps(_picklable()))):
        assert torch.equal(twin.weight, VALUE)
        assert type(twin._parameters) is dict


def _picklable() -> nn.Module:
    holder, _, _ = promised()
    return holder


def test_the_dictionary_promises_on() -> None:
    holder, make, deferred = promised()
    store = holder._parameters
    assert isinstance(store, Parameters)
    assert store.copy().unevaluated("weight") is deferred
    assert store.get("nothing", 1) == 1
    assert make.count == 0
    value = store.get("weight")
    assert dict(store)["weight"] is value
    assert next(iter(store.values())) is value
    assert next(iter(store.items())) == ("weight", value)
    del holder.weight
    assert "weight" not in store


def test_moving_a_module_moves_what_was_promised() -> None:
    holder, _, _ = promised()
    holder.double()
    assert holder.weight.dtype == torch.float64
    assert torch.equal(holder.weight, VALUE.double())


def test_an_error_is_raised_where_the_weight_is_read() -> None:
    def fails() -> torch.Tensor:
        raise ValueError("not finite")

    holder = nn.Linear(3, 5)
    set_lazy(holder, "weight", LazyTensor((5, 3), torch.float32, fails, "key"))
    with pytest.raises(ValueError, match="not finite"):
        holder.state_dict()
