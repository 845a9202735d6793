from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lora_fx import PassError
from lora_fx.graph.lazy_tensor import (
    LazyTensor,
    Parameters,
    TensorSnapshot,
    evaluate,
    get_unevaluated,
    set_lazy,
)

VALUE = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


class Counted:
    """Makes a tensor, and counts how often."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> torch.Tensor:
        self.count += 1
        return VALUE.clone()


def lazily() -> tuple[nn.Module, Counted, LazyTensor]:
    make = Counted()
    holder = nn.Linear(3, 5)
    lazy = LazyTensor((5, 3), torch.float32, make, "key")
    set_lazy(holder, "weight", lazy)
    return holder, make, lazy


def test_nothing_is_computed_before_it_is_read_and_once_after() -> None:
    holder, make, lazy = lazily()
    assert get_unevaluated(holder, "weight") is lazy
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
    holder, make, _ = lazily()
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
    _, make, lazy = lazily()
    assert torch.equal(lazy.evaluate(), VALUE)
    assert torch.equal(lazy.evaluate(), VALUE)
    assert make.count == 2
    kept = lazy.materialize()
    assert lazy.evaluate() is kept
    assert make.count == 3


def test_lazy_tensors_of_one_key_are_equal() -> None:
    one = LazyTensor((5, 3), torch.float32, Counted(), ("w", 1))
    assert one.equals(LazyTensor((5, 3), torch.float32, Counted(), ("w", 1)))
    assert not one.equals(LazyTensor((5, 3), torch.float32, Counted(), ("w", 2)))
    assert not one.equals(VALUE)


def test_copies_and_pickles_hold_tensors() -> None:
    for twin in (copy.deepcopy(lazily()[0]), pickle.loads(pickle.dumps(_picklable()))):
        assert torch.equal(twin.weight, VALUE)
        assert type(twin._parameters) is dict


def _picklable() -> nn.Module:
    holder, _, _ = lazily()
    return holder


def test_the_dictionary_of_parameters_passes_on_what_is_lazy() -> None:
    holder, make, lazy = lazily()
    store = holder._parameters
    assert isinstance(store, Parameters)
    assert store.copy().unevaluated("weight") is lazy
    assert store.get("nothing", 1) == 1
    assert make.count == 0
    value = store.get("weight")
    assert dict(store)["weight"] is value
    assert next(iter(store.values())) is value
    assert next(iter(store.items())) == ("weight", value)
    del holder.weight
    assert "weight" not in store


def test_moving_a_module_moves_what_was_lazily() -> None:
    holder, _, _ = lazily()
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


def made_of(holder: nn.Module, **options: bool) -> LazyTensor:
    """Twice the weight of a module."""
    held = TensorSnapshot.of(holder, "weight")
    return LazyTensor((5, 3), torch.float32, lambda: held.read() * 2, "twice", **options)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("read", ["evaluate", "materialize", "uncached"])
def test_what_is_made_of_a_tensor_that_changed_in_place_is_refused(read: str, cache: bool) -> None:
    holder = nn.Linear(3, 5).requires_grad_(False)
    before, later = made_of(holder, cache=cache), made_of(holder, cache=cache)
    torch.testing.assert_close(before.evaluate(), 2 * holder.weight)
    holder.weight.mul_(3)
    lazy = later.uncached() if read == "uncached" else later
    with pytest.raises(PassError, match="weight was changed in place after a weight was made of"):
        (lazy.materialize if read == "materialize" else lazy.evaluate)()
    torch.testing.assert_close(made_of(holder).evaluate(), 2 * holder.weight)


def test_a_lazy_source_that_was_read_and_then_changed_is_refused() -> None:
    holder, make, _ = lazily()
    first = made_of(holder)
    assert make.count == 0
    torch.testing.assert_close(first.evaluate(), 2 * VALUE)
    assert make.count == 1  # and not kept
    assert holder.weight is holder.weight
    torch.testing.assert_close(first.evaluate(), 2 * VALUE)  # that it was read is no change
    with torch.no_grad():
        holder.weight.mul_(3)
    with pytest.raises(PassError, match="weight was changed in place"):
        first.evaluate()
    torch.testing.assert_close(made_of(holder).evaluate(), 6 * VALUE)


def test_what_was_computed_is_the_same_whatever_becomes_of_its_sources() -> None:
    holder = nn.Linear(3, 5).requires_grad_(False)
    kept = made_of(holder)
    value = kept.materialize()
    holder.weight.mul_(3)
    assert kept.materialize() is value
    assert kept.evaluate() is value


def test_what_is_not_cached_is_computed_anew_for_each_reader() -> None:
    _, make, lazy = lazily()
    holder = nn.Linear(3, 5)
    set_lazy(holder, "weight", lazy.uncached())
    assert torch.equal(holder.weight, holder.weight)
    assert make.count == 2
    assert lazy._cached is None
    kept = lazy.materialize()
    assert holder.weight.data_ptr() == kept.data_ptr()  # who shares it sees what is kept
    assert make.count == 3


def test_a_tensor_and_a_lazy_one_are_read_by_one_function() -> None:
    _, make, lazy = lazily()
    plain = nn.Parameter(VALUE.clone())
    for value in (plain, lazy):
        assert torch.equal(evaluate(value), VALUE)
        assert not evaluate(value).requires_grad
    assert evaluate(plain).data_ptr() == plain.data_ptr()
    assert (make.count, lazy._cached) == (2, None)
